{{/*
Names. KServe writes objects of its own into the namespace of an InferenceService: NAME, NAME-predictor,
NAME-VARIANT-predictor, NAME-predictor-worker, NAME-head-N, NAME-workers-N, modelconfig-NAME-N and the same for
transformers and explainers. It overwrites or deletes what has these names, so nothing of the chart may.
*/}}

{{/* Name of the Deployment and Service that KServe writes for an InferenceService. */}}
{{- define "kserve-vllm.predictorName" -}}
{{- printf "%s-predictor" . -}}
{{- end }}

{{/* Name of what the chart itself writes for an InferenceService: HPA, PodDisruptionBudget, NetworkPolicy. */}}
{{- define "kserve-vllm.ownName" -}}
{{- printf "%s-kserve-vllm" . -}}
{{- end }}

{{/* Name of the object of a route. */}}
{{- define "kserve-vllm.routeName" -}}
{{- printf "%s-route" . -}}
{{- end }}

{{/* Names of gRPC's services at port 8081, which are the first part of a call's path: inference, and what every gRPC
client and probe asks for, health and the reflection by which grpcurl lists and describes. */}}
{{- define "kserve-vllm.grpcServices" -}}
inference.GRPCInferenceService,grpc.health.v1.Health,grpc.reflection.v1.ServerReflection,grpc.reflection.v1alpha.ServerReflection
{{- end }}

{{/* At most 63 characters; what is cut is made up for by a hash, so that two names stay two. */}}
{{- define "kserve-vllm.shorten" -}}
{{- if gt (len .) 63 }}{{ printf "%s-%s" (trunc 54 . | trimSuffix "-") (sha256sum . | trunc 8) }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{/* Name of a runtime. Takes (list $ key): cpu, gpu, multinode or extra.NAME, as in internal.runtimes. */}}
{{- define "kserve-vllm.runtimeName" -}}
{{- $root := index . 0 -}}
{{- $name := (index $root.Values.internal.runtimes (index . 1)).name -}}
{{- if $root.Values.runtimes.versionInName -}}
{{- $name = printf "%s-%s" $name (default $root.Chart.AppVersion $root.Values.image.tag | lower | replace "." "-" | replace "_" "-" | replace "+" "-") -}}
{{- end -}}
{{- include "kserve-vllm.shorten" $name -}}
{{- end }}

{{/* Priority of a runtime among those that KServe may choose. Takes (list $ priority-by-kind). KServe refuses a second
runtime of one priority for a format, so that with the version in the name the newer version comes before the kept older
one: 100 for each patch, 10,000 for each minor, 1,000,000 for each major version. */}}
{{- define "kserve-vllm.runtimePriority" -}}
{{- $root := index . 0 -}}
{{- $version := default $root.Chart.AppVersion $root.Values.image.tag -}}
{{- $parts := regexFind "[0-9]+(\\.[0-9]+)*" $version | splitList "." -}}
{{- $priority := index . 1 | int -}}
{{- if $root.Values.runtimes.versionInName -}}
{{- range $n, $weight := list 1000000 10000 100 -}}
{{- if lt $n (len $parts) }}{{ $priority = add $priority (mul $weight (min 99 (index $parts $n | default "0" | int))) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $priority -}}
{{- end }}

{{/* Name of the release, with the alias under which a parent chart has this one: it may have it twice. */}}
{{- define "kserve-vllm.releaseName" -}}
{{- .Release.Name -}}{{ if ne .Chart.Name "kserve-vllm" }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{/* Value of the label by which a release's PodMonitor finds the pods of its runtimes, whoever wrote the services. */}}
{{- define "kserve-vllm.runtimesOf" -}}
{{- include "kserve-vllm.shorten" (printf "%s.%s" .Release.Namespace (include "kserve-vllm.releaseName" .)) -}}
{{- end }}

{{/* Labels of an object of the chart; labels of the values win. Takes (list $ labels...). */}}
{{- define "kserve-vllm.labels" -}}
{{- $root := first . -}}
{{- $own := include "kserve-vllm.stableLabels.own" $root | fromYaml -}}
{{- $own = merge (dict "app.kubernetes.io/version" $root.Chart.AppVersion "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | trimSuffix "_")) $own -}}
{{- include "kserve-vllm.mergeMaps" (concat (list $own $root.Values.commonLabels) (rest .)) -}}
{{- end }}

{{/* Annotations of an object of the chart: commonAnnotations, and over them what else is given. Takes (list $ annotations...). */}}
{{- define "kserve-vllm.annotations" -}}
{{- include "kserve-vllm.mergeMaps" (concat (list (first .).Values.commonAnnotations) (rest .)) -}}
{{- end }}

{{/* The same without versions, for what reaches pods: else each upgrade of the chart would restart every model. */}}
{{- define "kserve-vllm.stableLabels" -}}
{{- include "kserve-vllm.mergeMaps" (concat (list (include "kserve-vllm.stableLabels.own" (first .) | fromYaml) (first .).Values.commonLabels) (rest .)) -}}
{{- end }}

{{- define "kserve-vllm.stableLabels.own" -}}
app.kubernetes.io/name: kserve-vllm
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}
