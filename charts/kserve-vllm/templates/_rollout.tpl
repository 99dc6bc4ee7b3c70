{{/* The pod that rolls a model out. Takes (list $ rollout), the name of which is the service's. Without the chart's version,
since the Job's name follows it. */}}
{{- define "kserve-vllm.rolloutPod" -}}
{{- $root := index . 0 -}}
{{- $r := index . 1 -}}
{{- $mounts := list (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $volumes := list (dict "name" "tmp" "emptyDir" dict) -}}
{{- $env := concat (list (dict "name" "HOME" "value" "/tmp")) (include "kserve-vllm.outwardEnv" $root | fromJsonArray) -}}
{{/* The API server is asked without the proxy; Kubernetes fills its address in. */}}
{{- range $env }}{{ if eq (lower .name) "no_proxy" }}{{ $_ := set . "value" (printf "%s,$(KUBERNETES_SERVICE_HOST)" .value) }}{{ end }}{{ end -}}
{{- $files := list (include "kserve-vllm.caFile" $root | fromJson) (dict "name" "prometheus" "secret" $r.prometheus.tokenSecret.name) (dict "name" "answers" "configMap" $r.answers.configMap) -}}
{{- range $files -}}
{{- if or .secret .configMap -}}
{{- $mounts = append $mounts (dict "name" .name "mountPath" (printf "/etc/kserve-vllm/%s" .name) "readOnly" true) -}}
{{- $volumes = append $volumes (include "kserve-vllm.fileVolume" . | fromJson) -}}
{{- end -}}
{{- end -}}
{{- with $r.answers.apiKey.secretName }}{{ $env = append $env (dict "name" "ANSWERS_KEY" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $r.answers.apiKey.key))) }}{{ end -}}
metadata:
  labels:
    {{- include "kserve-vllm.stableLabels" (list $root) | nindent 4 }}
  annotations:
    {{- include "kserve-vllm.annotations" (list $root (dict "sidecar.istio.io/inject" "false")) | nindent 4 }}
spec:
  # A policy for failures, as the Job has, wants this one.
  restartPolicy: Never
  serviceAccountName: {{ include "kserve-vllm.rolloutAccount" $r | quote }}
  # This one talks to the Kubernetes API, with the rights of its Role.
  automountServiceAccountToken: true
  enableServiceLinks: false
  securityContext:
    {{- include "kserve-vllm.podSecurityContext" $root | trim | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- include "kserve-vllm.secretNames" . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.placement" (list $root $r.job) }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    - name: rollout
      image: {{ include "kserve-vllm.image" (list $root "cpu") }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "kserve-vllm.containerSecurityContext" $root | nindent 8 }}
      command: [kserve-vllm, rollout]
      args:
        {{- include "kserve-vllm.rolloutArgs" . | fromJsonArray | toYaml | nindent 8 }}
      env:
        {{- include "kserve-vllm.env" (list $env $r.job.env) | nindent 8 }}
      {{- with $r.job.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $asked := dict "requests" (dict "cpu" $r.job.cpu "memory" $r.job.memory) "limits" (dict "memory" $r.job.memory) }}
        {{- include "kserve-vllm.quantities" (list $asked $r.job.resources) | nindent 8 }}
      volumeMounts:
        {{- include "kserve-vllm.mergeLists" (list "mountPath" $mounts $r.job.extraVolumeMounts) | nindent 8 }}
  volumes:
    {{- include "kserve-vllm.mergeLists" (list "name" $volumes $r.job.extraVolumes) | nindent 4 }}
{{- end }}

{{/* Its arguments. Takes (list $ rollout). Gives JSON. What is new and which attempt it is make the id, so that a Job that is
written again begins nothing again. */}}
{{- define "kserve-vllm.rolloutArgs" -}}
{{- $root := index . 0 -}}
{{- $r := index . 1 -}}
{{- $new := list -}}
{{- with $r.model }}{{ $new = append $new (printf "--model=%s" .) }}{{ end -}}
{{- with $r.image }}{{ $new = append $new (printf "--image=%s" .) }}{{ end -}}
{{- range $r.args }}{{ $new = append $new (printf "--arg=%s" (include "kserve-vllm.string" .)) }}{{ end -}}
{{- $args := concat (list $r.name (printf "--namespace=%s" $root.Release.Namespace)) $new -}}
{{- $args = append $args (printf "--id=%s-%d" (sha256sum (toJson $new) | trunc 8) (int $r.attempt)) -}}
{{- $args = append $args (printf "--prometheus=%s" (default $root.Values.cluster.prometheusAddress $r.prometheus.address)) -}}
{{- with $r.prometheus.tokenSecret }}{{ if .name }}{{ $args = append $args (printf "--prometheus-token-file=/etc/kserve-vllm/prometheus/%s" .key) }}{{ end }}{{ end -}}
{{- $steps := list -}}
{{- range $r.steps }}{{ $steps = append $steps (include "kserve-vllm.string" .) }}{{ end -}}
{{- $args = append $args (printf "--steps=%s" (join "," $steps)) -}}
{{- range $flag, $value := dict "interval" $r.intervalSeconds "initial-delay" $r.initialDelaySeconds "count" $r.count "threshold" $r.threshold "on-inconclusive" $r.onInconclusive "progress-deadline" $r.progressDeadlineSeconds "wait" $r.waitReadySeconds "min-samples" $r.minSamples "confidence" $r.confidence "max-error-rate" $r.maxErrorRate "max-refusal-rate" $r.maxRefusalRate "max-first-token" $r.maxFirstToken "max-gap" $r.maxGap "quantile" $r.quantile -}}
{{- $args = append $args (printf "--%s=%s" $flag (include "kserve-vllm.string" $value)) -}}
{{- end -}}
{{- with $r.answers -}}
{{- if .configMap -}}
{{- $args = append $args (printf "--answers=/etc/kserve-vllm/answers/%s" .key) -}}
{{- range $flag, $value := dict "max-tokens" .maxTokens "min-equal" .minEqual "max-length-drift" .maxLengthDrift "max-refusal-drift" .maxRefusalDrift "refusal-pattern" .refusalPattern -}}
{{- if ne (toString $value) "" }}{{ $args = append $args (printf "--%s=%s" $flag (include "kserve-vllm.string" $value)) }}{{ end -}}
{{- end -}}
{{- if .apiKey.secretName }}{{ $args = append $args "--answers-key-env=ANSWERS_KEY" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $args | toJson -}}
{{- end }}

{{/* Name of the Role, the binding and, unless another is named, the account of a rollout. Takes the rollout. */}}
{{- define "kserve-vllm.rolloutName" -}}
{{- include "kserve-vllm.shorten" (printf "%s-rollout" .name) -}}
{{- end }}

{{/* Name of its Job. Takes (list rollout pod). */}}
{{- define "kserve-vllm.rolloutJobName" -}}
{{- include "kserve-vllm.shorten" (printf "%s-rollout-%s" (index . 0).name (index . 1 | sha256sum | trunc 8)) -}}
{{- end }}

{{- define "kserve-vllm.rolloutAccount" -}}
{{- default (include "kserve-vllm.rolloutName" .) .serviceAccountName -}}
{{- end }}

{{/* What the rollout asks of the API server, by name wherever a name is known before. Takes (list $ rollout). Gives YAML. Of
a service that this release does not have the mode is not known, so that both modes' objects may be read. */}}
{{- define "kserve-vllm.rolloutRules" -}}
{{- $r := index . 1 -}}
{{- $s := index (index . 0).Values.internal.services $r.name | default dict -}}
{{- $unknown := empty $s -}}
- apiGroups: [serving.kserve.io]
  resources: [inferenceservices]
  resourceNames: [{{ $r.name | quote }}]
  verbs: [get, patch]
# The rollout's state. What is created has no name yet that RBAC could look at.
- apiGroups: [""]
  resources: [configmaps]
  resourceNames: [{{ printf "%s-rollout" $r.name | quote }}]
  verbs: [get, update]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create]
{{- if or $unknown $s.knative }}
- apiGroups: [serving.knative.dev]
  resources: [revisions]
  verbs: [get, delete]
{{- end }}
{{- if or $unknown (not $s.knative) }}
- apiGroups: [apps]
  resources: [deployments]
  resourceNames: [{{ include "kserve-vllm.predictorName" $r.name | quote }}, {{ include "kserve-vllm.predictorName" (printf "%s-canary" $r.name) | quote }}]
  verbs: [get]
- apiGroups: [gateway.networking.k8s.io]
  resources: [httproutes]
  resourceNames: [{{ $r.name | quote }}, {{ include "kserve-vllm.predictorName" $r.name | quote }}]
  verbs: [get]
{{- end }}
{{- if $r.answers.configMap }}
- apiGroups: [""]
  resources: [pods]
  verbs: [list]
- apiGroups: [""]
  resources: [pods/proxy]
  verbs: [create]
{{- end }}
{{- end }}

{{/* Of each of its objects, beside the name. Takes $. */}}
{{- define "kserve-vllm.rolloutMetadata" -}}
namespace: {{ .Release.Namespace | quote }}
labels:
  {{- include "kserve-vllm.labels" (list .) | nindent 2 }}
{{- with include "kserve-vllm.annotations" (list .) }}
annotations:
  {{- . | nindent 2 }}
{{- end }}
{{- end }}
