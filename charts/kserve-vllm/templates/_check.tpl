{{/*
Values that contradict each other, or that KServe or Knative would ignore or refuse, end with sentences that say what to
do: all of them at once, from the file of the object that they are about. A check prints a line for each sentence.
*/}}

{{/* End the render when there is a sentence. Takes what checks have printed. */}}
{{- define "kserve-vllm.fail" -}}
{{- $lines := list -}}
{{- range splitList "\n" . }}{{ with trim . }}{{ $lines = append $lines . }}{{ end }}{{ end -}}
{{- if $lines }}{{ fail (join "\n" ($lines | uniq)) }}{{ end -}}
{{- end }}

{{/* All about the InferenceServices. */}}
{{- define "kserve-vllm.check.services" -}}
{{- range .Values.internal.misnamed }}{{ if hasPrefix "inferenceService" . }}
{{ . }}
{{- end }}{{ end }}
{{- range $name, $s := .Values.internal.services }}
{{- $check := dict "root" $ "s" $s "at" (printf "inferenceServices.%s" $name) }}
{{ include "kserve-vllm.check.names" $check }}
{{ include "kserve-vllm.check.model" $check }}
{{ include (ternary "kserve-vllm.check.engine" "kserve-vllm.check.arguments" $s.other) $check }}
{{ include "kserve-vllm.check.environment" $check }}
{{ include "kserve-vllm.check.kubernetes" (list $ $check.at $s) }}
{{ include "kserve-vllm.check.kubernetes" (list $ (printf "%s.networkPolicy" $check.at) $s.networkPolicy) }}
{{ include "kserve-vllm.check.serviceMounts" (list $ $s $check.at) }}
{{ include "kserve-vllm.check.placement" $check }}
{{ include "kserve-vllm.check.coldStart" $check }}
{{ include "kserve-vllm.check.time" $check }}
{{ include "kserve-vllm.check.scaling" $check }}
{{ include "kserve-vllm.check.canary" $check }}
{{- end }}
{{ include "kserve-vllm.check.outward" . }}
{{ include "kserve-vllm.check.addresses" (list "inferenceServices" .Values.inferenceServices) }}
{{ include "kserve-vllm.check.addresses" (list "inferenceServiceDefaults" .Values.inferenceServiceDefaults) }}
{{ include "kserve-vllm.idle.services" . }}
{{- end }}

{{/* All about the runtimes, and values that belong to no object. */}}
{{- define "kserve-vllm.check.runtimes" -}}
{{- range .Values.internal.misnamed }}{{ if hasPrefix "runtimes" . }}
{{ . }}
{{- end }}{{ end }}
{{- if eq (toJson .Values.enabled) "false" }}
{{ printf "enabled is for the condition of a parent chart, and here it does nothing; switch off what you do not want: runtimes.enabled, tests.enabled, `enabled` of an entry." }}
{{- end }}
{{- if .Values.runtimes.enabled }}
{{- range $kind := list "cpu" "gpu" "multinode" }}
{{- if (index $.Values.runtimes $kind).enabled }}
{{ include "kserve-vllm.check.runtime" (list $ $kind) }}
{{- end }}
{{- end }}
{{- range $name, $extra := .Values.internal.extras }}
{{ include "kserve-vllm.check.runtime" (list $ (printf "extra.%s" $name)) }}
{{ include "kserve-vllm.idle.entry" (dict "root" $ "at" (printf "runtimes.extra.%s" $name) "kind" "extra" "chart" "extraRuntimeDefaults" "entry" $extra) }}
{{- end }}
{{- end }}
{{ include "kserve-vllm.check.runtimeNames" . }}
{{ include "kserve-vllm.check.engines" . }}
{{ include "kserve-vllm.check.alerts" . }}
{{ include "kserve-vllm.check.quantities" (list "tests.resources" .Values.tests.resources) }}
{{ include "kserve-vllm.check.kubernetes" (list . "tests" .Values.tests) }}
{{ include "kserve-vllm.check.plainText" . }}
{{ include "kserve-vllm.idle.release" . }}
{{- end }}

{{/* Where the values have a runtime. Takes its key. */}}
{{- define "kserve-vllm.runtimePath" -}}
runtimes.{{ regexReplaceAll "^engine[.](.+)[.][a-z]+$" . "engines.${1}" }}
{{- end }}

{{/* Of one runtime: its arguments and environment, and whether another release has it. Takes (list $ kind). */}}
{{- define "kserve-vllm.check.runtime" -}}
{{- $root := index . 0 -}}
{{- $at := include "kserve-vllm.runtimePath" (index . 1) -}}
{{- $runtime := index $root.Values.internal.runtimes (index . 1) -}}
{{- $owned := list "model" "model-id" "model-dir" "model-name" "served-model-name" "demo" "host" "port" "http-port" "grpc-port" "headless" "max-num-seqs" "drain-timeout" "drain-delay" "api-key" "config" "ssl-certfile" "ssl-keyfile" -}}
{{ include "kserve-vllm.check.words" (list $at "extraArgs" $runtime.extraArgs) }}
{{- range $runtime.extraArgs }}
{{- $word := include "kserve-vllm.string" . }}
{{- $flag := include "kserve-vllm.flag" $word }}
{{- if $runtime.facts }}
{{- if hasKey $runtime.facts.owned (regexReplaceAll "=.*" $word "") }}
{{ printf "%s: extraArgs has %s, which belongs to each InferenceService or to the chart." $at (regexReplaceAll "=.*" $word "") }}
{{- end }}
{{- else if or (has $flag $owned) (include "kserve-vllm.parallelFlag" $flag) }}
{{ printf "%s: extraArgs has --%s, which belongs to each InferenceService or to the chart: targets, ports, GPUs and grace are derived from it." $at $flag }}
{{- end }}
{{- if include "kserve-vllm.secretWord" $word }}
{{ printf "%s: extraArgs has --%s with a secret in plain text; give it as environment with valueFrom.secretKeyRef." $at $flag }}
{{- end }}
{{- end }}
{{ include "kserve-vllm.check.kubernetes" (list $root $at $runtime) }}
{{ include "kserve-vllm.check.mounts" (dict "at" $at "volumes" (list "tmp" "shm") "entry" $runtime) }}
{{- if contains "{{" (toJson (list $runtime.extraArgs $runtime.env)) }}
{{ printf "%s: two opening braces in extraArgs or env would be taken for a placeholder of KServe." $at }}
{{- end }}
{{- range $runtime.env }}
{{- if has .name (list "PYTHONPATH" "PIPELINE_PARALLEL_SIZE" "TENSOR_PARALLEL_SIZE") }}
{{ printf "%s: KServe refuses %s in the environment of a runtime." $at .name }}
{{- end }}
{{- if include "kserve-vllm.secretVariable" . }}
{{ printf "%s: %s looks like a secret and is given as plain text; use valueFrom.secretKeyRef." $at .name }}
{{- end }}
{{- end }}
{{- if eq $root.Values.runtimes.scope "Cluster" }}
{{- $name := include "kserve-vllm.runtimeName" . }}
{{- $found := dict "root" $root "api" "serving.kserve.io/v1alpha1" "kind" "ClusterServingRuntime" "namespace" "" "name" $name }}
{{- include "kserve-vllm.lookup" $found }}
{{- $owner := dig "metadata" "annotations" "meta.helm.sh/release-name" "" $found.object }}
{{- $home := dig "metadata" "annotations" "meta.helm.sh/release-namespace" "" $found.object }}
{{- if and $owner (or (ne $owner $root.Release.Name) (ne $home $root.Release.Namespace)) }}
{{ printf "%s: ClusterServingRuntime %s belongs to release %s in namespace %s. To run on it, set runtimes.enabled to false and `runtime: %s` in the services; for runtimes of your own, set runtimes.scope to Namespaced, or another name." $at $name $owner $home $name }}
{{- end }}
{{- end }}
{{- end }}

{{/* Of model caches of one type. Takes (list $ type). */}}
{{- define "kserve-vllm.check.caches" -}}
{{- $root := index . 0 -}}
{{- range $name, $c := $root.Values.internal.caches }}
{{- $at := printf "modelCaches.%s" $name }}
{{- if eq $c.type (index $ 1) }}
{{- if eq $c.type "LocalModelCache" }}
{{- if not (and $c.localModelCache.sourceModelUri $c.localModelCache.nodeGroups) }}
{{ printf "%s: a LocalModelCache needs localModelCache.sourceModelUri and localModelCache.nodeGroups." $at }}
{{- end }}
{{- $found := dict "root" $root "api" "serving.kserve.io/v1alpha1" "kind" "LocalModelCache" "namespace" "" "name" $name }}
{{- include "kserve-vllm.lookup" $found }}
{{- $source := dig "spec" "sourceModelUri" $c.localModelCache.sourceModelUri $found.object }}
{{- if ne $source $c.localModelCache.sourceModelUri }}
{{ printf "%s: LocalModelCache %s is there with the model %s, which can't change; give the cache another name." $at $name $source }}
{{- end }}
{{- else }}
{{- if eq (empty $c.huggingFace.repository) (empty $c.files) }}
{{ printf "%s: give one of huggingFace.repository and files." $at }}
{{- end }}
{{ include "kserve-vllm.check.twice" (list $at "files" "path" $c.files) }}
{{- if and $c.tensorrtLLM.model (eq $c.directory $c.tensorrtLLM.directory) }}
{{ printf "%s: directory and tensorrtLLM.directory are the same, and the repository would be written into the model; change one." $at }}
{{- end }}
{{ include "kserve-vllm.check.claim" (dict "root" $root "c" $c "at" $at) }}
{{- end }}
{{ include "kserve-vllm.check.job" (list $root $at $c.job (list "models")) }}
{{ include "kserve-vllm.check.addresses" (list $at $c) }}
{{ include "kserve-vllm.idle.entry" (dict "root" $root "at" $at "kind" "modelCaches" "chart" "modelCacheDefaults" "entry" $c) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A claim that is there keeps its class and its modes, and its size only grows. */}}
{{- define "kserve-vllm.check.claim" -}}
{{- $c := .c -}}
{{- $found := dict "root" .root "api" "v1" "kind" "PersistentVolumeClaim" "namespace" .root.Release.Namespace "name" $c.name -}}
{{- if not $c.claim.existing }}{{ include "kserve-vllm.lookup" $found }}{{ end -}}
{{- with dig "spec" dict (default dict $found.object) }}
{{- if and $c.claim.storageClassName (ne $c.claim.storageClassName (default "" .storageClassName)) }}
{{ printf "%s: claim %s has storage class %q, which can't change; take claim.storageClassName back, or give the cache another name." $.at $c.name (default "" .storageClassName) }}
{{- end }}
{{- if ne (sortAlpha .accessModes | join ", ") (sortAlpha $c.claim.accessModes | join ", ") }}
{{ printf "%s: claim %s has access modes %s, which can't change; take claim.accessModes back, or give the cache another name." $.at $c.name (join ", " .accessModes) }}
{{- end }}
{{- end }}
{{- end }}
