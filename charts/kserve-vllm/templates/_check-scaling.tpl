{{/* Of autoscaling. */}}
{{- define "kserve-vllm.check.scaling" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- $a := $s.autoscaling -}}
{{ include "kserve-vllm.check.annotations" . }}
{{- if eq $s.class "kpa" }}
{{ printf "%s: KServe refuses kpa as autoscalerClass. Knative's autoscaler needs none: leave autoscaling.class empty in Knative mode." $at }}
{{- end }}
{{- $classes := ternary (list "knative") (list "none" "hpa" "keda") $s.knative -}}
{{- if not (has $s.class $classes) }}
{{ printf "%s: autoscaling.class %s does not exist in %s mode; it takes %s." $at $s.class $s.mode (join ", " $classes) }}
{{- end }}
{{- if has $s.class $classes }}
{{- $metrics := index (dict "knative" (list "concurrency" "rps") "hpa" (list "cpu" "memory" "queue-depth" "kv-cache" "ttft-p99") "keda" (list "queue-depth" "kv-cache" "ttft-p99") "none" (list "")) $s.class -}}
{{- if not (has $s.metric $metrics) }}
{{ printf "%s: autoscaling.metric %s cannot be used by %s in %s mode; it takes %s." $at $s.metric $s.class $s.mode (join ", " $metrics | default "none") }}
{{- end }}
{{- end }}
{{- if and (eq $s.metric "rps") (not $a.target) }}
{{ printf "%s: requests per second cannot be derived from a profile; give autoscaling.target." $at }}
{{- end }}
{{- if and (has $s.metric (list "concurrency" "rps" "cpu" "memory")) (ne (float64 (int $s.target)) (float64 $s.target)) }}
{{ printf "%s: autoscaling.target for %s must be a whole number." $at $s.metric }}
{{- end }}
{{- if and (eq $s.metric "kv-cache") (gt (float64 $s.target) 1.0) }}
{{ printf "%s: autoscaling.target for kv-cache is a share of the cache, at most 1; %s would never be reached." $at (include "kserve-vllm.string" $s.target) }}
{{- end }}
{{- $hard := $a.knative.containerConcurrency }}
{{- if and $hard $a.target (eq $s.metric "concurrency") (gt (float64 $a.target) (float64 $hard)) }}
{{ printf "%s: autoscaling.target %s is above autoscaling.knative.containerConcurrency %d, which Knative then takes instead; lower the one or raise the other." $at (include "kserve-vllm.string" $a.target) (int $hard) }}
{{- end }}
{{- if lt (int $s.max) (int $s.min) }}
{{ printf "%s: autoscaling.maxReplicas %d is below minReplicas %d." $at (int $s.max) (int $s.min) }}
{{- end }}
{{- if and (eq $s.class "none") (gt (int $s.max) (int $s.min)) }}
{{ printf "%s: autoscaling.class none keeps minReplicas pods; maxReplicas %d would never be reached." $at (int $s.max) }}
{{- end }}
{{- if and (not $s.knative) (eq (int $s.min) 0) }}
{{ printf "%s: only Knative scales to zero: without a pod there is no metric that could bring one back. Set autoscaling.minReplicas to 1." $at }}
{{- end }}
{{- end }}

{{/*
Of annotations that say what a value says and other values are derived from, under any spelling that Knative takes
(min-scale, minScale); the other annotations win over the values. Takes a dict with root, s and at.
*/}}
{{- define "kserve-vllm.check.annotations" -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- $owned := dict
  "serving.kserve.io/deployment-mode" "deploymentMode"
  "serving.kserve.io/autoscaler-class" "autoscaling.class"
  "serving.kserve.io/enable-tag-routing" "tagRouting"
  "serving.knative.dev/progress-deadline" "progressDeadlineSeconds"
  "autoscaling.knative.dev/class" "autoscaling.class"
  "autoscaling.knative.dev/min-scale" "autoscaling.minReplicas"
  "autoscaling.knative.dev/max-scale" "autoscaling.maxReplicas"
  "autoscaling.knative.dev/initial-scale" "autoscaling.knative.initialScale"
  "autoscaling.knative.dev/target" "autoscaling.target"
  "autoscaling.knative.dev/metric" "autoscaling.metric" -}}
{{- range $key := concat (keys $s.annotations) (keys $s.podAnnotations) (keys .root.Values.commonAnnotations) | uniq | sortAlpha }}
{{- $name := printf "%s/%s" (dir $key) (base $key | kebabcase) }}
{{- if hasKey $owned $name }}
{{ printf "%s: an annotation has %s; set %s instead, other values are derived from it." $at $key (index $owned $name) }}
{{- end }}
{{- end }}
{{- end }}
