{{/*
An InferenceService of the values, worked out. Takes (list $ name) and gives JSON: the entry over its defaults plus
mode, kind (of runtime), runtimeName, format, class, metric, target, min, max, timeout, grace, drainTimeout,
drainDelay, gpus, engineArgs (head and workers alike), args, fetch (what KServe fetches) and flags (of Knative).
*/}}
{{- define "kserve-vllm.service" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $s := include "kserve-vllm.entry" (list $root.Values.inferenceServiceDefaults (index $root.Values.inferenceServices $name)) | fromJson -}}
{{- $_ := set $s "name" $name -}}
{{- $mode := default $root.Values.cluster.deploymentMode $s.deploymentMode -}}
{{- $knative := eq $mode "Knative" -}}
{{- $_ := set $s "mode" $mode -}}
{{- $_ := set $s "knative" $knative -}}
{{- $kind := ternary "multinode" $s.device $s.multiNode.enabled -}}
{{- $_ := set $s "kind" $kind -}}
{{- $_ := set $s "runtimeName" (include "kserve-vllm.runtimeName" (list $root $kind)) -}}
{{- $fetched := list -}}
{{- range $s.lora.adapters }}{{ if .storageUri }}{{ $fetched = append $fetched . }}{{ end }}{{ end -}}
{{- $_ := set $s "fetchedAdapters" $fetched -}}
{{- $_ := set $s "format" (default (ternary "kserve-vllm" "huggingface" (ne $s.storageUri "")) $s.modelFormat) -}}

{{/* GPUs: a share of one GPU (memory or cores) is still one device. */}}
{{- $tensor := int $s.parallelism.tensor -}}
{{- $pipeline := int $s.parallelism.pipeline -}}
{{- $shared := regexMatch "(gpu-?mem|gpu-?core|gpumem|gpucores)" ($s.gpu.resource | lower) -}}
{{- $_ := set $s "sharedGpu" $shared -}}
{{- $_ := set $s "gpusNeeded" (ternary $tensor (mul $tensor $pipeline) $s.multiNode.enabled) -}}
{{- $_ := set $s "gpus" (ternary 0 (default $s.gpusNeeded $s.gpu.count) (eq $s.device "cpu")) -}}

{{/* Time. */}}
{{- $limit := int $root.Values.cluster.maxRevisionTimeoutSeconds -}}
{{- $_ := set $s "timeout" (int (default (ternary (min 600 $limit) 3600 $knative) $s.timeoutSeconds)) -}}
{{- $_ := set $s "drainTimeout" (int $s.drain.timeoutSeconds) -}}
{{- $_ := set $s "drainDelay" (ternary 0 10 $knative) -}}
{{- if not (kindIs "invalid" $s.drain.delaySeconds) }}{{ $_ := set $s "drainDelay" (int $s.drain.delaySeconds) }}{{ end -}}
{{- $drain := add (int $s.drainTimeout) (int $s.drainDelay) -}}
{{- $_ := set $s "grace" (ternary (int $s.timeout) (int (default (add $drain 30) $s.terminationGracePeriodSeconds)) $knative) -}}
{{- $_ := set $s "progressDeadline" (int (default $root.Values.runtimes.progressDeadlineSeconds $s.progressDeadlineSeconds)) -}}

{{/* Autoscaling. */}}
{{- $class := default (ternary "knative" "none" $knative) $s.autoscaling.class -}}
{{- $_ := set $s "class" $class -}}
{{- $metric := default (dict "knative" "concurrency" "hpa" "queue-depth" "keda" "queue-depth" "none" "" | dig $class "") $s.autoscaling.metric -}}
{{- $_ := set $s "metric" $metric -}}
{{- $min := int $s.autoscaling.minReplicas -}}
{{- $_ := set $s "min" $min -}}
{{- $_ := set $s "max" (int (default (ternary $min (max 3 $min) (eq $class "none")) $s.autoscaling.maxReplicas)) -}}
{{- $profiles := ($root.Files.Get "files/profiles.yaml" | fromYaml).maxNumSeqs -}}
{{- $seqs := int (default (index $profiles $s.profile) $s.maxNumSeqs) -}}
{{- $targets := dict "concurrency" $seqs "queue-depth" 4 "kv-cache" 0.8 "ttft-p99" 2 "cpu" 80 "memory" 80 -}}
{{- $_ := set $s "target" (default (dig $metric nil $targets) $s.autoscaling.target) -}}
{{- $_ := set $s "resourceMetric" (has $metric (list "cpu" "memory")) -}}

{{/* The command line. Head and workers of a multi-node service must agree on what shapes the engine. */}}
{{- $engine := list (printf "--profile=%s" $s.profile) -}}
{{- if eq $s.task "embed" }}{{ $engine = append $engine "--runner=pooling" }}{{ end -}}
{{- with $s.maxModelLen }}{{ $engine = append $engine (printf "--max-model-len=%d" (int .)) }}{{ end -}}
{{- with $s.maxNumSeqs }}{{ $engine = append $engine (printf "--max-num-seqs=%d" (int .)) }}{{ end -}}
{{- if not $s.multiNode.enabled -}}
{{- if gt $tensor 1 }}{{ $engine = append $engine (printf "--tensor-parallel-size=%d" $tensor) }}{{ end -}}
{{- if gt $pipeline 1 }}{{ $engine = append $engine (printf "--pipeline-parallel-size=%d" $pipeline) }}{{ end -}}
{{- end -}}
{{- with $s.quantization }}{{ $engine = append $engine (printf "--quantization=%s" .) }}{{ end -}}
{{- with $s.speculative }}{{ $engine = append $engine (printf "--speculative-config=%s" (toJson .)) }}{{ end -}}
{{- with $s.lora.adapters -}}
{{- $engine = append $engine "--enable-lora" -}}
{{- $engine = append $engine (printf "--max-loras=%d" (int (default (len .) $s.lora.maxLoras))) -}}
{{- with $s.lora.maxRank }}{{ $engine = append $engine (printf "--max-lora-rank=%d" (int .)) }}{{ end -}}
{{- end -}}
{{- $_ := set $s "engineArgs" (concat $engine $s.extraArgs) -}}

{{- $args := list -}}
{{- if $s.demo }}{{ $args = append $args "--demo" }}{{ end -}}
{{- with $s.model }}{{ $args = append $args (printf "--model=%s" .) }}{{ end -}}
{{- if $fetched }}{{ $args = append $args "--model=/mnt/models/base" }}{{ end -}}
{{- range $s.servedNames }}{{ $args = append $args (printf "--model-name=%s" .) }}{{ end -}}
{{- $args = concat $args $engine -}}
{{- with $s.lora.adapters -}}
{{- $args = append $args "--lora-modules" -}}
{{- range . }}{{ $args = append $args (printf "%s=%s" .name (default (printf "/mnt/models/adapters/%s" .name) .path)) }}{{ end -}}
{{- end -}}
{{- with $s.chatTemplate.configMap }}{{ $args = append $args (printf "--chat-template=/etc/kserve-vllm/chat-template/%s" $s.chatTemplate.key) }}{{ end -}}
{{- if $s.sharing.keys.secret }}{{ $args = append $args (printf "--keys-file=/etc/kserve-vllm/keys/%s" $s.sharing.keys.key) }}{{ end -}}
{{- range $name := list "adapters" "warmup" "moderation" -}}
{{- $file := index $s.sharing $name -}}
{{- if $file.configMap }}{{ $args = append $args (printf "--%s-file=/etc/kserve-vllm/%s/%s" $name $name $file.key) }}{{ end -}}
{{- end -}}
{{- $args = append $args (printf "--drain-timeout=%d" (int $s.drainTimeout)) -}}
{{- if int $s.drainDelay }}{{ $args = append $args (printf "--drain-delay=%d" (int $s.drainDelay)) }}{{ end -}}
{{- $_ := set $s "args" (concat $args $s.extraArgs) -}}

{{/* Secrets and ConfigMaps that are mounted below /etc/kserve-vllm. */}}
{{- $files := list -}}
{{- with $s.chatTemplate.configMap }}{{ $files = append $files (dict "name" "chat-template" "configMap" .) }}{{ end -}}
{{- with $s.sharing.keys.secret }}{{ $files = append $files (dict "name" "keys" "secret" .) }}{{ end -}}
{{- range $name := list "adapters" "warmup" "moderation" -}}
{{- with (index $s.sharing $name).configMap }}{{ $files = append $files (dict "name" $name "configMap" .) }}{{ end -}}
{{- end -}}
{{- $_ := set $s "files" $files -}}

{{/* What Knative keeps behind a feature flag, of this service and of its runtime. */}}
{{- $flags := list -}}
{{- if $knative -}}
{{- $runtime := index $root.Values.runtimes $kind -}}
{{- if or $s.nodeSelector $runtime.nodeSelector }}{{ $flags = append $flags "kubernetes.podspec-nodeselector" }}{{ end -}}
{{- if or $s.tolerations $runtime.tolerations }}{{ $flags = append $flags "kubernetes.podspec-tolerations" }}{{ end -}}
{{- if or $s.affinity (and $s.gpu.products (eq $s.device "gpu")) }}{{ $flags = append $flags "kubernetes.podspec-affinity" }}{{ end -}}
{{- if $s.topologySpreadConstraints }}{{ $flags = append $flags "kubernetes.podspec-topologyspreadconstraints" }}{{ end -}}
{{- if $s.runtimeClassName }}{{ $flags = append $flags "kubernetes.podspec-runtimeclassname" }}{{ end -}}
{{- if $s.priorityClassName }}{{ $flags = append $flags "kubernetes.podspec-priorityclassname" }}{{ end -}}
{{- if $s.schedulerName }}{{ $flags = append $flags "kubernetes.podspec-schedulername" }}{{ end -}}
{{- if $fetched }}{{ $flags = append $flags "kubernetes.podspec-init-containers" }}{{ end -}}
{{- if hasPrefix "pvc://" $s.storageUri }}{{ $flags = append $flags "kubernetes.podspec-persistent-volume-claim" }}{{ end -}}
{{- range concat $s.env $runtime.env -}}
{{- if and (kindIs "map" .valueFrom) .valueFrom.fieldRef }}{{ $flags = append $flags "kubernetes.podspec-fieldref" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $_ := set $s "flags" ($flags | uniq) -}}
{{- include "kserve-vllm.checkService" (list $root $s) | trim -}}
{{- $s | toJson -}}
{{- end }}
