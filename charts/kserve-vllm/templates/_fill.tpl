{{/* The pod that fills a claim with a model. Takes (list $ cache). Without the chart's version: see jobs.yaml. */}}
{{- define "kserve-vllm.fillPod" -}}
{{- $root := index . 0 -}}
{{- $c := index . 1 -}}
{{- $hub := $c.huggingFace -}}
{{- $source := dict "directory" $c.directory "files" $c.files "repository" $hub.repository "revision" $hub.revision "endpoint" $hub.endpoint "exclude" $hub.exclude -}}
metadata:
  labels:
    {{- include "kserve-vllm.stableLabels" (list $root) | nindent 4 }}
  annotations:
    sidecar.istio.io/inject: "false"
spec:
  restartPolicy: OnFailure
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- include "kserve-vllm.podSecurityContext" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- include "kserve-vllm.secretNames" . | nindent 4 }}
  {{- end }}
  {{- with $c.job.nodeSelector }}
  nodeSelector:
    {{- include "kserve-vllm.strings" . | nindent 4 }}
  {{- end }}
  {{- with $c.job.tolerations }}
  tolerations:
    {{- include "kserve-vllm.tolerations" . | nindent 4 }}
  {{- end }}
  containers:
    - name: fill
      image: {{ include "kserve-vllm.image" (list $root "cpu") }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "kserve-vllm.containerSecurityContext" $root | nindent 8 }}
      command:
        - python3
        - -c
        - |
          {{- $root.Files.Get "files/scripts/fill_cache.py" | nindent 10 }}
      args:
        - {{ $source | toJson | quote }}
      env:
        - name: HOME
          value: /tmp
        {{- with $hub.tokenSecret.name }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ . | quote }}
              key: {{ $hub.tokenSecret.key | quote }}
        {{- end }}
      resources:
        requests:
          cpu: {{ $c.job.cpu | quote }}
          memory: {{ $c.job.memory | quote }}
        limits:
          memory: {{ $c.job.memory | quote }}
      volumeMounts:
        - name: models
          mountPath: /models
        - name: tmp
          mountPath: /tmp
  volumes:
    - name: models
      persistentVolumeClaim:
        claimName: {{ default $c.name $c.claim.existing | quote }}
    - name: tmp
      emptyDir: {}
{{- end }}
