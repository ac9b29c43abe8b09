# How alerts/rules.yaml and deploy/prometheus/fleet-rules.yaml are linted in .ci/run, without
# a Prometheus server. What needs one (do the series exist, do the labels match)
# promtool's tests say.
parser {
  include = ["alerts/rules.yaml", "deploy/prometheus/fleet-rules.yaml"]
}

rule {
  match {
    kind = "alerting"
  }
  label "severity" {
    severity = "bug"
    value    = "(critical|warning|info)"
    required = true
  }
  annotation "summary" {
    severity = "bug"
    required = true
  }
  annotation "description" {
    severity = "bug"
    required = true
  }
  annotation "remedy" {
    severity = "bug"
    required = true
  }
  annotation "tiers" {
    severity = "bug"
    required = true
  }
  annotation "runbook_url" {
    severity = "bug"
    value    = "https://github.com/sockq/sockq/blob/main/alerts/runbooks/{{ $alert }}.md"
    required = true
  }
}

# Listeners of a node are told apart by these.
rule {
  match {
    name = "sockq:listener_.+"
    kind = "recording"
  }
  aggregate ".+" {
    severity = "bug"
    keep     = ["job", "instance", "netns"]
  }
}

# A node is a target.
rule {
  match {
    name = "sockq:node_.+"
    kind = "recording"
  }
  aggregate ".+" {
    severity = "bug"
    keep     = ["job", "instance"]
  }
}
