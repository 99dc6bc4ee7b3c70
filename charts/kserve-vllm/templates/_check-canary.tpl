{{/* Of the canary. */}}
{{- define "kserve-vllm.check.canary" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- $c := $s.canary -}}
{{- if $s.canaryOn }}
{{- if ne (and true (ne $c.storageUri "")) (and true (ne $s.storageUri "")) }}
{{ printf "%s: the canary's model must come the same way as the service's: canary.storageUri for a storageUri, canary.model for a model." $at }}
{{- end }}
{{- if and (not $c.storageUri) (not $c.model) }}
{{ printf "%s: the canary needs a model of its own, canary.storageUri or canary.model." $at }}
{{- end }}
{{- if and $c.storageUri $c.model }}
{{ printf "%s: give one of canary.storageUri and canary.model." $at }}
{{- end }}
{{- if not $s.knative }}
{{- if not $root.Values.cluster.gatewayAPI }}
{{ printf "%s: a canary percent in Standard mode needs KServe's Gateway API support (enableGatewayApi); without it KServe ignores it silently. Set cluster.gatewayAPI when it is on, or use Knative mode." $at }}
{{- end }}
{{- $version := include "kserve-vllm.kserveVersion" $root | default "0.21" }}
{{- if semverCompare "<0.21" $version }}
{{ printf "%s: KServe %s sends no traffic to a Standard canary (0.20 starts its pods, earlier ones not even that); upgrade KServe to 0.21 or later, or use Knative mode." $at $version }}
{{- end }}
{{- if $s.multiNode.enabled }}
{{ printf "%s: KServe has no canary for multi-node services." $at }}
{{- end }}
{{- if $s.fetchedAdapters }}
{{ printf "%s: KServe does not fetch adapters for a canary in Standard mode; give them as path." $at }}
{{- end }}
{{- if and $c.replicas (gt (int $c.replicas) (int $s.min)) }}
{{ printf "%s: canary.replicas %d is more than minReplicas %d, which KServe refuses." $at (int $c.replicas) (int $s.min) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
