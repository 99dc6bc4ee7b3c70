{{/* The question that KEDA puts to Prometheus. The answer over the target is the number of pods, so a mean or a
quantile is multiplied by the number of pods that report. */}}
{{- define "kserve-vllm.kedaQuery" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $selector := printf "{namespace=%q,pod=~%q}" $root.Release.Namespace (printf "%s-.+" (include "kserve-vllm.predictorName" $s.name)) -}}
{{- $metrics := $s.facts.metrics | default dict -}}
{{- if and $s.other (eq $s.metric "queue-depth") -}}
sum({{ $metrics.queue }}{{ $selector }})
{{- else if and $s.other (eq $s.metric "kv-cache") -}}
sum(avg by (pod) ({{ $metrics.cache }}{{ $selector }}))
{{- else if $s.other -}}
(histogram_quantile(0.99, sum by (le) (rate({{ $metrics.firstToken }}_bucket{{ $selector }}[2m]))) > 0) * on() count(count by (pod) ({{ $metrics.running }}{{ $selector }})) or on() vector(0)
{{- else if eq $s.metric "queue-depth" -}}
sum(vllm:num_requests_waiting{{ $selector }})
{{- else if eq $s.metric "kv-cache" -}}
sum(avg by (pod) (vllm:kv_cache_usage_perc{{ $selector }}))
{{- else -}}
(histogram_quantile(0.99, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket{{ $selector }}[2m]))) > 0) * on() count(count by (pod) (vllm:num_requests_running{{ $selector }})) or on() vector(0)
{{- end -}}
{{- end }}

{{/* How long a new number must hold before HPA or KEDA acts on it. */}}
{{- define "kserve-vllm.scalingBehaviour" -}}
{{- with .autoscaling.stabilization -}}
{{- if not (kindIs "invalid" .scaleUpSeconds) }}
scaleUp:
  stabilizationWindowSeconds: {{ int .scaleUpSeconds }}
{{- end }}
{{- if not (kindIs "invalid" .scaleDownSeconds) }}
scaleDown:
  stabilizationWindowSeconds: {{ int .scaleDownSeconds }}
{{- end }}
{{- end -}}
{{- end }}
