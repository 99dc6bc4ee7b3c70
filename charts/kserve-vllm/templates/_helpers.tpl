{{/* Labels of every object of the chart. */}}
{{- define "kserve-vllm.labels" -}}
app.kubernetes.io/name: kserve-vllm
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of what KServe copies onto pods: without a version, or each upgrade of the chart would restart every model. */}}
{{- define "kserve-vllm.stableLabels" -}}
app.kubernetes.io/name: kserve-vllm
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* Image of a flavour. Takes (list $ "cpu"|"gpu"). */}}
{{- define "kserve-vllm.image" -}}
{{- $root := index . 0 -}}
{{- $flavour := index . 1 -}}
{{- $image := $root.Values.image -}}
{{- printf "%s/%s:%s-%s" $image.registry $image.repository (default $root.Chart.AppVersion $image.tag) $flavour -}}
{{- with index $image.digests $flavour }}@{{ . }}{{ end -}}
{{- end }}

{{/* Name of a runtime. Takes (list $ "cpu"|"gpu"|"multinode"). */}}
{{- define "kserve-vllm.runtimeName" -}}
{{- $root := index . 0 -}}
{{- $name := (index $root.Values.runtimes (index . 1)).name -}}
{{- if $root.Values.runtimes.versionInName -}}
{{- $name = printf "%s-%s" $name (default $root.Chart.AppVersion $root.Values.image.tag | lower | replace "." "-" | replace "_" "-" | replace "+" "-") -}}
{{- end -}}
{{- $name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* Not root, nothing to gain, nothing to write on. The uid is the image's. */}}
{{- define "kserve-vllm.containerSecurityContext" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 1000
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/*
Pod security context of the chart's own pods (Jobs, tests); a runtime cannot carry one. The group is set on all of a
volume: a pod that mounted a directory before the Job made it has left it to root.
*/}}
{{- define "kserve-vllm.podSecurityContext" -}}
fsGroup: 1000
fsGroupChangePolicy: Always
runAsGroup: 1000
runAsNonRoot: true
runAsUser: 1000
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Seconds of the startup probe: the longest load. */}}
{{- define "kserve-vllm.startupBudget" -}}
{{- $probe := .Values.runtimes.probes.startup -}}
{{- mul (int $probe.periodSeconds) (int $probe.failureThreshold) -}}
{{- end }}

{{/* A string as YAML writes it in a list, safe for any content. */}}
{{- define "kserve-vllm.stringList" -}}
{{- range $i, $item := . }}{{ if $i }}{{ "\n" }}{{ end }}- {{ $item | quote }}{{ end }}
{{- end }}

{{/* An entry's values: the defaults with what the entry changes. Takes (list $defaults $entry). */}}
{{- define "kserve-vllm.entry" -}}
{{- mergeOverwrite (deepCopy (index . 0)) (deepCopy (default dict (index . 1))) | toJson -}}
{{- end }}

{{/* Name of the Deployment, Service and pods' prefix of an InferenceService in both modes. */}}
{{- define "kserve-vllm.predictorName" -}}
{{- printf "%s-predictor" . -}}
{{- end }}
