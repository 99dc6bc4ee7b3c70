{{/* What every serving container has in common. Takes (list $ key), as the others here. */}}
{{- define "kserve-vllm.runtime.container" -}}
{{- $root := index . 0 -}}
{{- $runtime := index $root.Values.internal.runtimes (index . 1) -}}
image: {{ $runtime.image | default (include "kserve-vllm.image" (list $root (ternary "cpu" "gpu" (eq $runtime.base "cpu")))) }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
resources:
  requests:
    cpu: {{ $runtime.requests.cpu | quote }}
    memory: {{ $runtime.requests.memory | quote }}
securityContext:
  {{- mergeOverwrite (include "kserve-vllm.containerSecurityContext" $root | fromYaml) $runtime.securityContext | include "kserve-vllm.given" | fromJson | toYaml | nindent 2 }}
{{- with $runtime.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  {{- $own := list (dict "name" "tmp" "mountPath" "/tmp") (dict "name" "shm" "mountPath" "/dev/shm") }}
  {{- include "kserve-vllm.mergeLists" (list "mountPath" $own $runtime.extraVolumeMounts) | nindent 2 }}
{{- end }}

{{/* Environment of a serving container; the values win. Takes (list $ kind). */}}
{{- define "kserve-vllm.runtime.env" -}}
{{- $runtime := index (index . 0).Values.internal.runtimes (index . 1) -}}
{{- $own := include (ternary "kserve-vllm.engine.ownEnv" "kserve-vllm.runtime.ownEnv" (hasKey $runtime "facts")) . | fromYamlArray -}}
{{- include "kserve-vllm.env" (list $own $runtime.env) -}}
{{- end }}

{{/* Everything that wants to write goes to /tmp: the root file system is read-only. */}}
{{- define "kserve-vllm.runtime.ownEnv" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $runtime := index $root.Values.internal.runtimes $kind -}}
- name: HOME
  value: /tmp
{{- if include "kserve-vllm.openshift" $root }}
# A user that OpenShift gives out has no entry in /etc/passwd, where Python looks for its name.
- name: USER
  value: kserve-vllm
{{- end }}
- name: XDG_CACHE_HOME
  value: /tmp/cache
- name: HF_HOME
  value: /tmp/huggingface
- name: VLLM_CACHE_ROOT
  value: /tmp/vllm
- name: VLLM_CONFIG_ROOT
  value: /tmp/vllm-config
- name: TORCHINDUCTOR_CACHE_DIR
  value: /tmp/torchinductor
- name: TRITON_CACHE_DIR
  value: /tmp/triton
{{- if eq $runtime.base "cpu" }}
- name: VLLM_CPU_KVCACHE_SPACE
  value: {{ $runtime.kvCacheGiB | quote }}
{{- end }}
{{- if eq $kind "multinode" }}
# The address at which the other nodes find this one.
- name: VLLM_HOST_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{- end }}
{{- end }}

{{- define "kserve-vllm.runtime.volumes" -}}
{{- $root := index . 0 -}}
{{- $runtime := index $root.Values.internal.runtimes (index . 1) -}}
{{- $tmp := dict "name" "tmp" "emptyDir" (dict "sizeLimit" $root.Values.runtimes.tmpSizeLimit) -}}
{{- $shm := dict "name" "shm" "emptyDir" (dict "medium" "Memory" "sizeLimit" $runtime.sharedMemory) -}}
{{- include "kserve-vllm.mergeLists" (list "name" (list $tmp $shm) $runtime.extraVolumes) -}}
{{- end }}

{{- define "kserve-vllm.runtime.scheduling" -}}
{{- $root := index . 0 -}}
{{- $runtime := index $root.Values.internal.runtimes (index . 1) -}}
{{- with include "kserve-vllm.nodeSelector" (list $root $runtime.nodeSelector) }}
nodeSelector:
  {{- . | nindent 2 }}
{{- end }}
{{- with $runtime.tolerations }}
tolerations:
  {{- include "kserve-vllm.tolerations" . | nindent 2 }}
{{- end }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- include "kserve-vllm.secretNames" . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Flags by which the nodes of a multi-node service find each other. KServe adds the environment of the $(...). */}}
{{- define "kserve-vllm.runtime.multinodeArgs" -}}
- --distributed-executor-backend=mp
- --nnodes=$(PIPELINE_PARALLEL_SIZE)
- --pipeline-parallel-size=$(PIPELINE_PARALLEL_SIZE)
- --tensor-parallel-size=$(TENSOR_PARALLEL_SIZE)
- --master-port={{ .Values.runtimes.multinode.masterPort | int }}
{{- end }}

{{/* Annotations that every pod of a runtime gets unless its InferenceService says otherwise. Takes (list $ kind). */}}
{{- define "kserve-vllm.runtime.annotations" -}}
{{- $values := (index . 0).Values.runtimes -}}
{{- $facts := (index (index . 0).Values.internal.runtimes (index . 1)).facts -}}
{{- $metrics := ternary (dig "metrics" dict (default dict $facts)) (dict "port" 8080) (not (empty $facts)) -}}
{{- $own := dict -}}
{{- with $metrics.port }}{{ $own = dict "prometheus.kserve.io/path" "/metrics" "prometheus.kserve.io/port" (int . | toString) }}{{ end -}}
{{/* Knative's proxies are Go's, which close a connection under a stream whose request they think unread. */}}
{{- $_ := set $own "features.knative.dev/http-full-duplex" "Enabled" -}}
{{- $_ := set $own "serving.knative.dev/progress-deadline" (printf "%ds" (int $values.progressDeadlineSeconds)) -}}
{{/* Stages are nodes and ranks are GPUs of a node, as vLLM's own multi-node start has it. */}}
{{- if eq (index . 1) "multinode" }}{{ $_ := set $own "multinode/executor-backend" "mp" }}{{ end -}}
{{- include "kserve-vllm.mergeMaps" (list $own $values.podAnnotations) -}}
{{- end }}

{{/* Labels of every pod of a runtime. The last one is what the release's PodMonitor selects by. */}}
{{- define "kserve-vllm.runtime.labels" -}}
{{- include "kserve-vllm.mergeMaps" (list (dict "app.kubernetes.io/part-of" "kserve-vllm") .Values.runtimes.podLabels (dict "kserve-vllm/runtimes-of" (include "kserve-vllm.runtimesOf" .))) -}}
{{- end }}
