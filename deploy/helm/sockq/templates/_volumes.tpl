{{- /* Mounts that the node makes and takes away later are followed (HostToContainer): names of
namespaces are such mounts, and what containers have mounted below the runtime's directory must
not be held by sockq when they are gone. */ -}}
{{- define "sockq.mounts" -}}
{{- with (include "sockq.criPath" .) }}
- name: cri
  mountPath: {{ . }}
  readOnly: true
  {{- if ne . $.Values.pods.criSocket }}
  mountPropagation: HostToContainer
  {{- end }}
{{- end }}
{{- if .Values.hostPaths.netns }}
- name: netns
  mountPath: /run/netns
  readOnly: true
  mountPropagation: HostToContainer
{{- end }}
{{- if .Values.hostPaths.tracing }}
- name: tracing
  mountPath: /sys/kernel/tracing
  readOnly: true
{{- end }}
{{- if .Values.webConfig.secretName }}
- name: web-config
  mountPath: /etc/sockq/web
  readOnly: true
{{- end }}
{{- if include "sockq.kubelet" . }}
- name: kubelet-token
  mountPath: /run/secrets/sockq
  readOnly: true
{{- end }}
{{- end -}}

{{- define "sockq.volumes" -}}
{{- with (include "sockq.criPath" .) }}
# The container runtime, for the names of containers and pods.
- name: cri
  hostPath:
    path: {{ . }}
    type: {{ ternary "Socket" "DirectoryOrCreate" (eq . $.Values.pods.criSocket) }}
{{- end }}
{{- if .Values.hostPaths.netns }}
# Names of network namespaces.
- name: netns
  hostPath:
    path: /run/netns
    type: DirectoryOrCreate
{{- end }}
{{- if .Values.hostPaths.tracing }}
# The numbers of tracepoints, for what listen(), accept() and connect() return on
# kernels without trampolines.
- name: tracing
  hostPath:
    path: /sys/kernel/tracing
    type: Directory
{{- end }}
{{- with .Values.webConfig.secretName }}
- name: web-config
  secret:
    secretName: {{ . }}
    defaultMode: 0400
{{- end }}
{{- if include "sockq.kubelet" . }}
- name: kubelet-token
  projected:
    defaultMode: 0400
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3600
      {{- if not .Values.pods.kubelet.insecureSkipVerify }}
      - configMap:
          name: kube-root-ca.crt
          items: [{key: ca.crt, path: ca.crt}]
      {{- end }}
{{- end }}
{{- end -}}
