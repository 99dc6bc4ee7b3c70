{{/* The pod that fills a claim with a model. Takes (list $ cache). Without the chart's version: see jobs.yaml. */}}
{{- define "kserve-vllm.fillPod" -}}
{{- $root := index . 0 -}}
{{- $c := index . 1 -}}
{{- $hub := $c.huggingFace -}}
{{- $source := dict "directory" $c.directory "files" $c.files "repository" $hub.repository "revision" $hub.revision "endpoint" $hub.endpoint "exclude" $hub.exclude -}}
{{- $env := concat (list (dict "name" "HOME" "value" "/tmp")) (include "kserve-vllm.outwardEnv" $root | fromJsonArray) -}}
{{- with $hub.tokenSecret.name }}{{ $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" $hub.tokenSecret.key))) }}{{ end -}}
{{- $mounts := list (dict "name" "models" "mountPath" "/models") (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $volumes := list (dict "name" "models" "persistentVolumeClaim" (dict "claimName" (default $c.name $c.claim.existing))) (dict "name" "tmp" "emptyDir" dict) -}}
{{- $ca := include "kserve-vllm.caFile" $root | fromJson -}}
{{- if $ca -}}
{{- $mounts = append $mounts (dict "name" "ca" "mountPath" "/etc/kserve-vllm/ca" "readOnly" true) -}}
{{- $volumes = append $volumes (include "kserve-vllm.fileVolume" $ca | fromJson) -}}
{{- end -}}
metadata:
  labels:
    {{- include "kserve-vllm.stableLabels" (list $root) | nindent 4 }}
  annotations:
    {{- include "kserve-vllm.annotations" (list $root (dict "sidecar.istio.io/inject" "false")) | nindent 4 }}
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- include "kserve-vllm.podSecurityContext" $root | trim | nindent 4 }}
  {{- $fill := include "kserve-vllm.fillContainer" (list $root $c $env $mounts $source) }}
  {{- if or $c.job.initContainers $c.tensorrtLLM.model }}
  initContainers:
    {{- with $c.job.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- if $c.tensorrtLLM.model }}
    {{- $fill | nindent 4 }}
    {{- end }}
  {{- end }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- include "kserve-vllm.secretNames" . | nindent 4 }}
  {{- end }}
  {{- with include "kserve-vllm.placement" (list $root $c.job) }}
  {{- . | nindent 2 }}
  {{- end }}
  containers:
    {{- if $c.tensorrtLLM.model }}
    {{- include "kserve-vllm.buildContainer" (list $root $c $mounts) | nindent 4 }}
    {{- else }}
    {{- $fill | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "kserve-vllm.mergeLists" (list "name" $volumes $c.job.extraVolumes) | nindent 4 }}
{{- end }}

{{/* The container that fetches the model. Takes (list $ cache env mounts source). */}}
{{- define "kserve-vllm.fillContainer" -}}
{{- $root := index . 0 -}}
{{- $c := index . 1 -}}
{{- $env := index . 2 -}}
{{- $mounts := index . 3 -}}
{{- $source := index . 4 -}}
- name: fill
  image: {{ include "kserve-vllm.image" (list $root "cpu") }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  securityContext:
    {{- include "kserve-vllm.containerSecurityContext" $root | nindent 4 }}
  command:
    - python3
    - -c
    - |
      {{- $root.Files.Get "files/scripts/fill_cache.py" | nindent 6 }}
  args:
    - {{ $source | toJson | quote }}
  env:
    {{- include "kserve-vllm.env" (list $env $c.job.env) | nindent 4 }}
  {{- with $c.job.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources:
    {{- $asked := dict "requests" (dict "cpu" $c.job.cpu "memory" $c.job.memory) "limits" (dict "memory" $c.job.memory) }}
    {{- include "kserve-vllm.quantities" (list $asked $c.job.resources) | nindent 4 }}
  volumeMounts:
    {{- include "kserve-vllm.mergeLists" (list "mountPath" $mounts $c.job.extraVolumeMounts) | nindent 4 }}
{{- end }}

{{/* The container that builds TensorRT-LLM's engine and Triton's repository of what is fetched. Takes (list $ cache mounts). */}}
{{- define "kserve-vllm.buildContainer" -}}
{{- $root := index . 0 -}}
{{- $c := index . 1 -}}
{{- $t := $c.tensorrtLLM -}}
{{- $gpus := dict $t.gpuResource (int $t.tensor) -}}
{{- $what := dict "model" $c.directory "name" $t.model "repository" $t.directory "tensor" (int $t.tensor) "maxBatchSize" (int $t.maxBatchSize) "maxSeqLen" (int $t.maxSeqLen) "maxNumTokens" (int $t.maxNumTokens) -}}
- name: build
  image: {{ $t.image | default (index $root.Values.internal.runtimes "engine.triton.gpu").image }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  securityContext:
    {{- include "kserve-vllm.containerSecurityContext" $root | nindent 4 }}
  command:
    - python3
    - -c
    - |
      {{- $root.Files.Get "files/scripts/build_engine.py" | nindent 6 }}
  args:
    - {{ $what | toJson | quote }}
  env:
    {{- $own := list (dict "name" "HOME" "value" "/tmp") (dict "name" "HF_HUB_OFFLINE" "value" "1") }}
    {{- include "kserve-vllm.env" (list $own $c.job.env) | nindent 4 }}
  {{- with $c.job.envFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources:
    {{- $asked := dict "requests" (dict "cpu" $c.job.cpu "memory" $t.memory) "limits" (merge (dict "memory" $t.memory) $gpus) }}
    {{- $given := dict "requests" (omit (default dict $c.job.resources.requests) "memory") "limits" (omit (default dict $c.job.resources.limits) "memory") }}
    {{- include "kserve-vllm.quantities" (list $asked $given) | nindent 4 }}
  volumeMounts:
    {{- include "kserve-vllm.mergeLists" (list "mountPath" (index . 2) $c.job.extraVolumeMounts) | nindent 4 }}
{{- end }}
