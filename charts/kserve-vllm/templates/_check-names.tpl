{{/*
Of names. KServe makes labels and host names of an InferenceService's, and each of them may have 63 characters:
`isvc.NAME-predictor` in Standard mode, `isvc.NAME-predictor-worker` with multiNode, `isvc.NAME-VARIANT-predictor` for a
canary; Knative's tags `prev-NAME-predictor` and `latest-NAME-predictor`; the first label of cluster.domainTemplate.
*/}}
{{- define "kserve-vllm.check.names" -}}
{{- $root := .root -}}
{{- $s := .s -}}
{{- $at := .at -}}
{{- $limit := 53 -}}
{{- $why := "Knative's Service of it ends in -predictor" -}}
{{- if $s.multiNode.enabled -}}
{{- $limit = 41 -}}{{ $why = "KServe labels the workers of a multiNode service isvc.NAME-predictor-worker" -}}
{{- else if not $s.knative -}}
{{- $limit = 48 -}}{{ $why = "KServe labels its pods isvc.NAME-predictor in Standard mode" -}}
{{- else if $s.tagRouting -}}
{{- $limit = 46 -}}{{ $why = "with tagRouting Knative calls a revision latest-NAME-predictor" -}}
{{- else if $s.canaryOn -}}
{{- $limit = 48 -}}{{ $why = "with a canary Knative calls the other revision prev-NAME-predictor" -}}
{{- end -}}
{{- if gt (len $s.name) $limit }}
{{ printf "%s: the name has %d characters and may have %d: %s, and 63 are taken." $at (len $s.name) $limit $why }}
{{- end }}
{{- if and $s.canaryOn (not $s.knative) (gt (len (printf "%s-%s" $s.name $s.canary.variant)) 48) }}
{{ printf "%s: name and canary.variant together may have 47 characters, since KServe labels the canary's pods isvc.NAME-VARIANT-predictor, and 63 are taken." $at }}
{{- end }}
{{- if and $s.canaryOn (not $s.knative) (hasKey $root.Values.internal.services (printf "%s-%s" $s.name $s.canary.variant)) }}
{{ printf "%s: its canary's objects would be called as those of inferenceServices.%s-%s; change canary.variant." $at $s.name $s.canary.variant }}
{{- end }}
{{- range $key := list "serving.kserve.io/inferenceservice" "kserve-vllm/runtimes-of" }}
{{- if or (hasKey $s.labels $key) (hasKey $s.podLabels $key) (hasKey $root.Values.commonLabels $key) (hasKey $root.Values.runtimes.podLabels $key) }}
{{ printf "%s: a label has %s, by which the chart's PodMonitor, NetworkPolicy and PodDisruptionBudget find the pods; take it out." $at $key }}
{{- end }}
{{- end }}
{{- if hasKey $root.Values.internal.services (include "kserve-vllm.predictorName" $s.name) }}
{{ printf "%s: KServe writes objects called %s-predictor for it, as for inferenceServices.%s-predictor; give that one another name." $at $s.name $s.name }}
{{- end }}
{{- range $list, $items := dict "lora.adapters" $s.lora.adapters "initContainers" $s.initContainers "resourceClaims" $s.resourceClaims }}
{{ include "kserve-vllm.check.twice" (list $at $list "name" $items) }}
{{- end }}
{{/* A key may be there once for each of the two things to do. */}}
{{- range $what := list "DoNotSchedule" "ScheduleAnyway" }}
{{- $same := list }}
{{- range $s.topologySpreadConstraints }}{{ if eq .whenUnsatisfiable $what }}{{ $same = append $same . }}{{ end }}{{ end }}
{{ include "kserve-vllm.check.twice" (list $at "topologySpreadConstraints" "topologyKey" $same) }}
{{- end }}
{{- range $s.topologySpreadConstraints }}
{{- if and .minDomains (eq .whenUnsatisfiable "ScheduleAnyway") }}
{{ printf "%s: topologySpreadConstraints: minDomains is for whenUnsatisfiable DoNotSchedule alone, and the API server refuses it here; take it out." $at }}
{{- end }}
{{- $selector := .labelSelector | default dict }}
{{- range .matchLabelKeys }}
{{- if hasKey ($selector.matchLabels | default dict) . }}
{{ printf "%s: topologySpreadConstraints: %s is in matchLabelKeys and in labelSelector, which the API server refuses; take one out." $at . }}
{{- end }}
{{- end }}
{{- end }}
{{- range $s.lora.adapters }}
{{- if has .name (append $s.servedNames $s.name) }}
{{ printf "%s: adapter %s is called as the model itself; give it another name." $at .name }}
{{- end }}
{{- end }}
{{- $hosts := list (ternary $s.name (include "kserve-vllm.predictorName" $s.name) $s.knative) -}}
{{- range $hosts }}
{{- $host := regexReplaceAll "{{ *[.]Name *}}" $root.Values.cluster.domainTemplate . }}
{{- $host = regexReplaceAll "{{ *[.]Namespace *}}" $host $root.Release.Namespace }}
{{- $label := regexReplaceAll "{{[^}]*}}" $host "x" | splitList "." | first }}
{{- if gt (len $label) 63 }}
{{ printf "%s: KServe's host name for it would begin with %s, %d characters of 63 at most. Shorten name or namespace, or set cluster.domainTemplate when the cluster's is another." $at $label (len $label) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of lists whose items have a key. Takes (list at name key items). */}}
{{- define "kserve-vllm.check.twice" -}}
{{- $key := index . 2 -}}
{{- $seen := list -}}
{{- range index . 3 }}
{{- $name := index . $key | trimSuffix "/" }}
{{- if has $name $seen }}
{{ printf "%s: %s has %s twice; take one out." (index $ 0) (index $ 1) $name }}
{{- end }}
{{- $seen = append $seen $name }}
{{- end }}
{{- end }}

{{/* Of runtimes that would be written under one name. */}}
{{- define "kserve-vllm.check.runtimeNames" -}}
{{- if .Values.runtimes.enabled }}
{{- $taken := dict }}
{{- $internal := .Values.internal }}
{{- $order := list "gpu" "cpu" "multinode" }}
{{- range keys $internal.extras | sortAlpha }}{{ $order = append $order (printf "extra.%s" .) }}{{ end }}
{{- range concat $order (keys $internal.engineRuntimes | sortAlpha) }}
{{- if (index $internal.runtimes .).enabled }}
{{- $name := include "kserve-vllm.runtimeName" (list $ .) }}
{{- if hasKey $taken $name }}
{{ printf "%s: %s has this name; take another one." (include "kserve-vllm.runtimePath" .) (include "kserve-vllm.runtimePath" (index $taken $name)) }}
{{- end }}
{{- $_ := set $taken $name . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
