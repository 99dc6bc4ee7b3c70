{{/* What every serving container has in common. Takes (list $ kind): kind is cpu, gpu or multinode. */}}
{{- define "kserve-vllm.runtime.container" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $runtime := index $root.Values.runtimes $kind -}}
image: {{ include "kserve-vllm.image" (list $root (ternary "cpu" "gpu" (eq $kind "cpu"))) }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
resources:
  requests:
    cpu: {{ $runtime.requests.cpu | quote }}
    memory: {{ $runtime.requests.memory }}
securityContext:
  {{- include "kserve-vllm.containerSecurityContext" $root | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: shm
    mountPath: /dev/shm
{{- end }}

{{/* Everything that wants to write goes to /tmp: the root file system is read-only. */}}
{{- define "kserve-vllm.runtime.env" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $runtime := index $root.Values.runtimes $kind -}}
- name: HOME
  value: /tmp
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
{{- if eq $kind "cpu" }}
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
{{- with $runtime.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "kserve-vllm.runtime.volumes" -}}
{{- $root := index . 0 -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ $root.Values.runtimes.tmpSizeLimit }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ (index $root.Values.runtimes (index . 1)).sharedMemory }}
{{- end }}

{{- define "kserve-vllm.runtime.scheduling" -}}
{{- $root := index . 0 -}}
{{- $runtime := index $root.Values.runtimes (index . 1) -}}
{{- with $runtime.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $runtime.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
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

{{/* One runtime. Takes (list $ kind priority). */}}
{{- define "kserve-vllm.runtime" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $values := $root.Values.runtimes -}}
{{- $runtime := index $values $kind -}}
{{- include "kserve-vllm.checkRuntime" (list $root $kind) | trim -}}
apiVersion: serving.kserve.io/v1alpha1
{{- if eq $values.scope "Cluster" }}
kind: ClusterServingRuntime
{{- else }}
kind: ServingRuntime
{{- end }}
metadata:
  name: {{ include "kserve-vllm.runtimeName" (list $root $kind) }}
  {{- if ne $values.scope "Cluster" }}
  namespace: {{ $root.Release.Namespace }}
  {{- end }}
  labels:
    {{- include "kserve-vllm.labels" $root | nindent 4 }}
  {{- if $values.keepOnUpgrade }}
  annotations:
    helm.sh/resource-policy: keep
  {{- end }}
spec:
  annotations:
    prometheus.kserve.io/path: /metrics
    prometheus.kserve.io/port: "8080"
    # Knative's proxies are Go's, which close a connection under a stream whose request they think unread.
    features.knative.dev/http-full-duplex: Enabled
    serving.knative.dev/progress-deadline: {{ printf "%ds" (int $values.progressDeadlineSeconds) }}
    {{- if eq $kind "multinode" }}
    # Stages are nodes and ranks are GPUs of a node, as vLLM's own multi-node start has it.
    multinode/executor-backend: mp
    {{- end }}
    {{- with $values.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  labels:
    app.kubernetes.io/part-of: kserve-vllm
    {{- with $values.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  supportedModelFormats:
    # A name of its own: no other runtime's format can collide with it.
    - name: kserve-vllm
      version: "1"
      autoSelect: {{ $values.autoSelect }}
      {{- if $values.autoSelect }}
      priority: {{ index . 2 }}
      {{- end }}
    # For a model that the engine fetches itself: without a storageUri, KServe leaves only this format without an agent.
    - name: huggingface
      autoSelect: false
  protocolVersions:
    - v1
    - v2
    - grpc-v2
  {{- with include "kserve-vllm.runtime.scheduling" (list $root $kind) | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  volumes:
    {{- include "kserve-vllm.runtime.volumes" (list $root $kind) | nindent 4 }}
  containers:
    - name: kserve-container
      {{- include "kserve-vllm.runtime.container" (list $root $kind) | nindent 6 }}
      args:
        - {{ printf "--model_name=%s" "{{.Name}}" | quote }}
        {{- if eq $kind "multinode" }}
        - --node-rank=0
        - --master-addr=$(VLLM_HOST_IP)
        {{- include "kserve-vllm.runtime.multinodeArgs" $root | nindent 8 }}
        {{- end }}
        {{- with $runtime.extraArgs }}
        {{- include "kserve-vllm.stringList" . | nindent 8 }}
        {{- end }}
      env:
        {{- include "kserve-vllm.runtime.env" (list $root $kind) | nindent 8 }}
      # One port: Knative takes no more. An InferenceService in Standard mode adds gRPC's.
      ports:
        - containerPort: 8080
          protocol: TCP
      startupProbe:
        httpGet:
          path: /v2/health/ready
          port: 8080
        periodSeconds: {{ int $values.probes.startup.periodSeconds }}
        failureThreshold: {{ int $values.probes.startup.failureThreshold }}
        timeoutSeconds: 5
      readinessProbe:
        httpGet:
          path: /v2/health/ready
          port: 8080
        periodSeconds: {{ int $values.probes.readiness.periodSeconds }}
        failureThreshold: {{ int $values.probes.readiness.failureThreshold }}
        timeoutSeconds: 5
      livenessProbe:
        httpGet:
          path: /v2/health/live
          port: 8080
        periodSeconds: {{ int $values.probes.liveness.periodSeconds }}
        failureThreshold: {{ int $values.probes.liveness.failureThreshold }}
        timeoutSeconds: 5
  {{- if eq $kind "multinode" }}
  workerSpec:
    pipelineParallelSize: 2
    tensorParallelSize: 1
    {{- with include "kserve-vllm.runtime.scheduling" (list $root $kind) | trim }}
    {{- . | nindent 4 }}
    {{- end }}
    volumes:
      {{- include "kserve-vllm.runtime.volumes" (list $root $kind) | nindent 6 }}
    containers:
      - name: worker-container
        {{- include "kserve-vllm.runtime.container" (list $root $kind) | nindent 8 }}
        # Pods of a Deployment have no number: the script finds this node's rank and then runs `kserve-vllm serve`.
        command:
          - python3
          - -c
          - |
            {{- $root.Files.Get "files/scripts/worker_start.py" | nindent 12 }}
        args:
          - --headless
          - --model=/mnt/models
          - --master-addr=$(HEAD_SVC)
          {{- include "kserve-vllm.runtime.multinodeArgs" $root | nindent 10 }}
          {{- with $runtime.extraArgs }}
          {{- include "kserve-vllm.stringList" . | nindent 10 }}
          {{- end }}
        env:
          {{- include "kserve-vllm.runtime.env" (list $root $kind) | nindent 10 }}
        # A worker whose head has started anew belongs to no group any more and has to start anew too.
        livenessProbe:
          exec:
            command:
              - python3
              - -c
              - |
                {{- $root.Files.Get "files/scripts/worker_live.py" | nindent 16 }}
          periodSeconds: 15
          failureThreshold: 4
          timeoutSeconds: 10
  {{- end }}
{{- end }}
