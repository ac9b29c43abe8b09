{{- define "sockq.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "sockq" .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-sockq" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sockq.selector" -}}
app.kubernetes.io/name: sockq
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sockq.labels" -}}
{{ include "sockq.selector" . }}
app.kubernetes.io/component: agent
app.kubernetes.io/part-of: sockq
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "sockq.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "sockq.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "sockq.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sockq.kubelet" -}}
{{- if and .Values.owners (eq .Values.pods.source "kubelet") }}true{{ end -}}
{{- end -}}

{{- /* Whether the kubelet's URL has a name that somebody must look up. */ -}}
{{- define "sockq.kubeletName" -}}
{{- if not (regexMatch "^https://(\\$\\(NODE_IP\\)|\\[|[0-9.]+[:/])" .Values.pods.kubelet.url) }}true{{ end -}}
{{- end -}}

{{- /* The directory of the runtime's socket: a runtime that restarts makes a new socket,
which a mount of the old one would not follow. Of /run only the socket. */ -}}
{{- define "sockq.criPath" -}}
{{- if and .Values.owners (eq .Values.pods.source "cri") -}}
{{- $socket := .Values.pods.criSocket -}}
{{- if has (dir $socket) (list "/run" "/var/run") }}{{ $socket }}{{ else }}{{ dir $socket }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* Helm knows whole numbers of a file as floating ones. */ -}}
{{- define "sockq.flag" -}}
{{- if kindIs "bool" .value -}}
--{{ if not .value }}no-{{ end }}{{ .name }}
{{- else if and (kindIs "float64" .value) (eq .value (floor .value)) -}}
--{{ .name }}={{ int64 .value }}
{{- else -}}
--{{ .name }}={{ .value }}
{{- end -}}
{{- end -}}

{{- define "sockq.probe" -}}
{{- $scheme := .root.Values.probes.scheme | default (ternary "TCP" "HTTP" (ne .root.Values.webConfig.secretName "")) -}}
{{- if eq $scheme "TCP" -}}
tcpSocket:
  port: metrics
{{- else -}}
httpGet:
  path: {{ .path }}
  port: metrics
  scheme: {{ $scheme }}
{{- end -}}
{{- end -}}

{{- /* honorLabels, since namespace, pod and container in sockq's series tell whose a socket
is. For the same reason the labels of sockq's own pod have to go: Prometheus would give them
to each series that has none, such as those of sshd. */ -}}
{{- define "sockq.endpoint" -}}
- port: metrics
  path: {{ index .root.Values.flags "web.telemetry-path" | default "/metrics" }}
  interval: {{ .monitor.interval }}
  scrapeTimeout: {{ .monitor.scrapeTimeout }}
  honorLabels: true
  {{- with .monitor.endpoint }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  relabelings:
    - sourceLabels: [__meta_kubernetes_pod_node_name]
      targetLabel: instance
      action: replace
    - regex: namespace|pod|container|service|endpoint
      action: labeldrop
    {{- with .monitor.relabelings }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .monitor.metricRelabelings }}
  metricRelabelings:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
