{{/* One runtime. Takes (list $ key priority): the key is cpu, gpu, multinode or extra.NAME, as in internal.runtimes. */}}
{{- define "kserve-vllm.runtime" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $values := $root.Values.runtimes -}}
{{- $runtime := index $root.Values.internal.runtimes $kind -}}
apiVersion: serving.kserve.io/v1alpha1
{{- if eq $values.scope "Cluster" }}
kind: ClusterServingRuntime
{{- else }}
kind: ServingRuntime
{{- end }}
metadata:
  name: {{ include "kserve-vllm.runtimeName" (list $root $kind) | quote }}
  {{- if ne $values.scope "Cluster" }}
  namespace: {{ $root.Release.Namespace | quote }}
  {{- end }}
  labels:
    {{- include "kserve-vllm.labels" (list $root) | nindent 4 }}
  {{- with include "kserve-vllm.annotations" (list $root (ternary (dict "helm.sh/resource-policy" "keep") dict $values.keepOnUpgrade)) }}
  annotations:
    {{- . | nindent 4 }}
  {{- end }}
spec:
  annotations:
    {{- include "kserve-vllm.runtime.annotations" (list $root $kind) | nindent 4 }}
  labels:
    {{- include "kserve-vllm.runtime.labels" $root | nindent 4 }}
  supportedModelFormats:
    # A name of its own: no other runtime's format can collide with it.
    - name: kserve-vllm
      version: "1"
      {{- $auto := and $values.autoSelect (not (hasPrefix "extra." $kind)) }}
      autoSelect: {{ $auto }}
      {{- if $auto }}
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
        {{- if ne $values.host "0.0.0.0" }}
        - {{ printf "--host=%s" $values.host | quote }}
        {{- end }}
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
      # One port: Knative takes no more. An InferenceService with gRPC names it h2c, or adds another one in Standard mode.
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
