{{/*
Values that contradict each other, or that KServe or Knative would ignore or refuse, end here with a sentence that
says what to do. Takes (list $ service). Each check is a line: condition, then the sentence.
*/}}
{{- define "kserve-vllm.checkService" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $at := printf "inferenceServices.%s" $s.name -}}
{{- $raw := default dict (index $root.Values.inferenceServices $s.name) -}}
{{- $a := $s.autoscaling -}}

{{/* The model. */}}
{{- $sources := 0 -}}
{{- range list $s.storageUri $s.model $s.demo }}{{ if . }}{{ $sources = add1 $sources }}{{ end }}{{ end -}}
{{- if ne (int $sources) 1 }}
{{- fail (printf "%s: give exactly one of storageUri, model and demo; %d are given." $at (int $sources)) }}
{{- end }}
{{- if and (not $s.storageUri) (ne $s.format "huggingface") }}
{{- fail (printf "%s: without a storageUri and with modelFormat %s, KServe takes the service for multi-model serving and puts an agent sidecar into its pods. Give a storageUri, or leave modelFormat empty." $at $s.format) }}
{{- end }}
{{- if and $s.fetchedAdapters (not $s.storageUri) }}
{{- fail (printf "%s: KServe fetches an adapter's storageUri only together with the model's. Give the model as storageUri, or the adapter as path." $at) }}
{{- end }}
{{- if and $s.fetchedAdapters (or (hasPrefix "pvc://" $s.storageUri) (hasPrefix "oci" $s.storageUri)) }}
{{- fail (printf "%s: a model from pvc:// or oci:// is mounted whole, and adapters cannot be fetched beside it. Put the adapters into the same volume or image and give their path." $at) }}
{{- end }}
{{- range $s.fetchedAdapters }}
{{- if or (hasPrefix "pvc://" .storageUri) (hasPrefix "oci" .storageUri) }}
{{- fail (printf "%s: adapter %s cannot come from %s, KServe would mount it whole. Give a path, or a storageUri that is fetched." $at .name .storageUri) }}
{{- end }}
{{- end }}
{{- if and $s.sharing.adapters.configMap $s.lora.adapters }}
{{- fail (printf "%s: lora.adapters are fixed with the pod, sharing.adapters come and go; list all of them in the ConfigMap of sharing.adapters." $at) }}
{{- end }}
{{- if and $s.huggingFaceToken.secretName $s.storageUri }}
{{- fail (printf "%s: huggingFaceToken is for a model that the engine downloads. For a storageUri, KServe's download takes the token from the service account: see serviceAccounts." $at) }}
{{- end }}
{{- if and $s.lora.maxLoras (not $s.lora.adapters) }}
{{- fail (printf "%s: lora.maxLoras without lora.adapters does nothing." $at) }}
{{- end }}
{{- if and $s.lora.maxRank (not $s.lora.adapters) }}
{{- fail (printf "%s: lora.maxRank without lora.adapters does nothing." $at) }}
{{- end }}

{{/* The runtime. */}}
{{- if not (index $root.Values.runtimes $s.kind).enabled }}
{{- fail (printf "%s: it runs on runtimes.%s, which is not enabled." $at $s.kind) }}
{{- end }}

{{/* Arguments and environment. */}}
{{- $owned := dict "model" "model" "model-name" "servedNames" "model-dir" "storageUri" "served-model-name" "servedNames" "demo" "demo" "profile" "profile" "tensor-parallel-size" "parallelism.tensor" "pipeline-parallel-size" "parallelism.pipeline" "max-num-seqs" "maxNumSeqs" "max-model-len" "maxModelLen" "quantization" "quantization" "speculative-config" "speculative" "enable-lora" "lora.adapters" "lora-modules" "lora.adapters" "max-loras" "lora.maxLoras" "max-lora-rank" "lora.maxRank" "chat-template" "chatTemplate" "keys-file" "sharing.keys" "redis-url" "sharing.redis" "adapters-file" "sharing.adapters" "warmup-file" "sharing.warmup" "moderation-file" "sharing.moderation" "drain-timeout" "drain.timeoutSeconds" "drain-delay" "drain.delaySeconds" "runner" "task" -}}
{{- $fixed := list "host" "http-port" "grpc-port" "port" "headless" "nnodes" "node-rank" "master-addr" "master-port" -}}
{{- range $s.extraArgs }}
{{- $flag := regexReplaceAll "=.*" . "" | trimPrefix "--" | replace "_" "-" -}}
{{- if and (hasPrefix "--" .) (hasKey $owned $flag) }}
{{- fail (printf "%s: extraArgs has --%s; set %s instead, other values are derived from it." $at $flag (index $owned $flag)) }}
{{- end }}
{{- if and (hasPrefix "--" .) (has $flag (list "api-key")) }}
{{- fail (printf "%s: extraArgs has a key in plain text; give it as env KSERVE_VLLM_API_KEY with valueFrom.secretKeyRef." $at) }}
{{- end }}
{{- if and (hasPrefix "--" .) (has $flag $fixed) }}
{{- fail (printf "%s: extraArgs has --%s, which probes, ports and Services of the chart rely on." $at $flag) }}
{{- end }}
{{- end }}
{{- range concat $s.args (list (toJson $s.env)) }}
{{- if contains "{{" . }}
{{- fail (printf "%s: %q has two opening braces; KServe fills placeholders in arguments and environment, and would fail on it. Put a template into a ConfigMap (chatTemplate)." $at .) }}
{{- end }}
{{- end }}
{{- range $s.env }}
{{- if eq .name "PYTHONPATH" }}
{{- fail (printf "%s: KServe refuses PYTHONPATH in the environment." $at) }}
{{- end }}
{{- if and .value (regexMatch "(?i)(token|secret|password|api_?key)$" .name) }}
{{- fail (printf "%s: %s looks like a secret and is given as plain text; use valueFrom.secretKeyRef." $at .name) }}
{{- end }}
{{- end }}

{{/* GPUs. */}}
{{- if eq $s.device "cpu" }}
{{- if or $s.gpu.count $s.gpu.products }}
{{- fail (printf "%s: gpu.count and gpu.products do nothing with device cpu." $at) }}
{{- end }}
{{- if $s.multiNode.enabled }}
{{- fail (printf "%s: multiNode needs device gpu." $at) }}
{{- end }}
{{- else if $s.sharedGpu }}
{{- if gt (int $s.gpusNeeded) 1 }}
{{- fail (printf "%s: %s is a share of one GPU, but the parallelism needs %d GPUs." $at $s.gpu.resource (int $s.gpusNeeded)) }}
{{- end }}
{{- else if lt (int $s.gpus) (int $s.gpusNeeded) }}
{{- fail (printf "%s: gpu.count is %d, but the parallelism (tensor %d, pipeline %d) needs %d GPUs in a pod." $at (int $s.gpus) (int $s.parallelism.tensor) (int $s.parallelism.pipeline) (int $s.gpusNeeded)) }}
{{- end }}

{{/* Multi-node. */}}
{{- if $s.multiNode.enabled }}
{{- if $s.knative }}
{{- fail (printf "%s: multiNode works in Standard mode only; set deploymentMode: Standard." $at) }}
{{- end }}
{{- if not (or (hasPrefix "pvc://" $s.storageUri) (hasPrefix "oci://" $s.storageUri)) }}
{{- fail (printf "%s: multiNode takes the model from pvc:// or oci:// only." $at) }}
{{- end }}
{{- if ne $s.class "none" }}
{{- fail (printf "%s: multiNode does not scale; set autoscaling.class to none." $at) }}
{{- end }}
{{- if lt (int $s.parallelism.pipeline) 2 }}
{{- fail (printf "%s: multiNode takes one node for each pipeline stage; parallelism.pipeline must be 2 or more." $at) }}
{{- end }}
{{- if gt (int $s.min) 1 }}
{{- fail (printf "%s: KServe runs one group of nodes for a multiNode service; autoscaling.minReplicas must be 1." $at) }}
{{- end }}
{{- if ne (int $s.gpus) (int $s.gpusNeeded) }}
{{- fail (printf "%s: with multiNode KServe gives each node parallelism.tensor GPUs; leave gpu.count empty." $at) }}
{{- end }}
{{- if not (has $s.gpu.resource (list "nvidia.com/gpu" "amd.com/gpu" "intel.com/gpu" "habana.ai/gaudi")) }}
{{- fail (printf "%s: KServe does not know %s as a GPU of a multi-node service." $at $s.gpu.resource) }}
{{- end }}
{{- end }}

{{/* Time. */}}
{{- if and $s.knative (gt (int $s.timeout) (int $root.Values.cluster.maxRevisionTimeoutSeconds)) }}
{{- fail (printf "%s: timeoutSeconds is %d, but Knative refuses more than the cluster's max-revision-timeout-seconds of %d. Raise it in config-defaults and in cluster.maxRevisionTimeoutSeconds, or use Standard mode." $at (int $s.timeout) (int $root.Values.cluster.maxRevisionTimeoutSeconds)) }}
{{- end }}
{{- if and $s.knative $s.terminationGracePeriodSeconds }}
{{- fail (printf "%s: Knative refuses terminationGracePeriodSeconds, its grace is timeoutSeconds; leave it empty." $at) }}
{{- end }}
{{- if gt (add (int $s.drainTimeout) (int $s.drainDelay)) (int $s.grace) }}
{{- fail (printf "%s: the drain takes %d s (delay %d, timeout %d), but the pod is killed after %d s; raise %s or shorten the drain." $at (add (int $s.drainTimeout) (int $s.drainDelay)) (int $s.drainDelay) (int $s.drainTimeout) (int $s.grace) (ternary "timeoutSeconds" "terminationGracePeriodSeconds" $s.knative)) }}
{{- end }}
{{- if and $s.progressDeadlineSeconds (not $s.knative) }}
{{- fail (printf "%s: progressDeadlineSeconds is Knative's; in Standard mode runtimes.probes.startup decides." $at) }}
{{- end }}
{{- if and $s.knative (lt (int $s.progressDeadline) (int (include "kserve-vllm.startupBudget" $root))) }}
{{- fail (printf "%s: Knative would give up after %d s, while the startup probe still allows %s s; raise progressDeadlineSeconds or lower runtimes.probes.startup." $at (int $s.progressDeadline) (include "kserve-vllm.startupBudget" $root)) }}
{{- end }}

{{- if and $s.rollout $s.knative }}
{{- fail (printf "%s: Knative starts a new revision before it stops the old one; rollout is for Standard mode." $at) }}
{{- end }}
{{- if and $s.rollout $s.multiNode.enabled }}
{{- fail (printf "%s: KServe replaces all nodes of a multiNode service at once; leave rollout empty." $at) }}
{{- end }}

{{/* Autoscaling. */}}
{{- if eq $s.class "kpa" }}
{{- fail (printf "%s: KServe refuses kpa as autoscalerClass. Knative's autoscaler needs none: leave autoscaling.class empty in Knative mode." $at) }}
{{- end }}
{{- $classes := ternary (list "knative") (list "none" "hpa" "keda") $s.knative -}}
{{- if not (has $s.class $classes) }}
{{- fail (printf "%s: autoscaling.class %s does not exist in %s mode; it takes %s." $at $s.class $s.mode (join ", " $classes)) }}
{{- end }}
{{- $metrics := index (dict "knative" (list "concurrency" "rps") "hpa" (list "cpu" "memory" "queue-depth" "kv-cache" "ttft-p99") "keda" (list "queue-depth" "kv-cache" "ttft-p99") "none" (list "")) $s.class -}}
{{- if not (has $s.metric $metrics) }}
{{- fail (printf "%s: autoscaling.metric %s cannot be used by %s in %s mode; it takes %s." $at $s.metric $s.class $s.mode (join ", " $metrics | default "none")) }}
{{- end }}
{{- if and (eq $s.class "none") (not (kindIs "invalid" $a.target)) }}
{{- fail (printf "%s: autoscaling.target does nothing with class none." $at) }}
{{- end }}
{{- if and (eq $s.metric "rps") (not $a.target) }}
{{- fail (printf "%s: requests per second cannot be derived from a profile; give autoscaling.target." $at) }}
{{- end }}
{{- if and (has $s.metric (list "concurrency" "rps" "cpu" "memory")) (ne (float64 (int $s.target)) (float64 $s.target)) }}
{{- fail (printf "%s: autoscaling.target for %s must be a whole number." $at $s.metric) }}
{{- end }}
{{- if lt (int $s.max) (int $s.min) }}
{{- fail (printf "%s: autoscaling.maxReplicas %d is below minReplicas %d." $at (int $s.max) (int $s.min)) }}
{{- end }}
{{- if and (eq $s.class "none") (gt (int $s.max) (int $s.min)) }}
{{- fail (printf "%s: autoscaling.class none keeps minReplicas pods; maxReplicas %d would never be reached." $at (int $s.max)) }}
{{- end }}
{{- if and (not $s.knative) (eq (int $s.min) 0) }}
{{- fail (printf "%s: only Knative scales to zero: without a pod there is no metric that could bring one back. Set autoscaling.minReplicas to 1." $at) }}
{{- end }}
{{- $set := list -}}
{{- range $key, $value := $a.knative }}{{ if not (kindIs "invalid" $value) }}{{ $set = append $set $key }}{{ end }}{{ end -}}
{{- if and $set (not $s.knative) }}
{{- fail (printf "%s: autoscaling.knative.%s does nothing in Standard mode." $at (first $set)) }}
{{- end }}
{{- if and (not (kindIs "invalid" $a.knative.scaleToZeroRetentionSeconds)) (gt (int $s.min) 0) }}
{{- fail (printf "%s: autoscaling.knative.scaleToZeroRetentionSeconds does nothing while minReplicas is %d." $at (int $s.min)) }}
{{- end }}
{{- range $key := list "scaleUpSeconds" "scaleDownSeconds" }}
{{- if and (not (kindIs "invalid" (index $a.stabilization $key))) (not (has $s.class (list "hpa" "keda"))) }}
{{- fail (printf "%s: autoscaling.stabilization.%s is for hpa and keda." $at $key) }}
{{- end }}
{{- end }}
{{- if and (or $a.kedaAuthentication.name $a.kedaAuthentication.mode) (ne $s.class "keda") }}
{{- fail (printf "%s: autoscaling.kedaAuthentication is for keda." $at) }}
{{- end }}
{{- if and $a.kedaAuthentication.mode (not $a.kedaAuthentication.name) }}
{{- fail (printf "%s: autoscaling.kedaAuthentication.mode needs a name." $at) }}
{{- end }}
{{- if and $a.hpaMetricName (or (ne $s.class "hpa") $s.resourceMetric) }}
{{- fail (printf "%s: autoscaling.hpaMetricName is for hpa on a metric of vLLM." $at) }}
{{- end }}

{{/* Canary. */}}
{{- $c := $s.canary -}}
{{- if kindIs "invalid" $c.percent }}
{{- if or $c.storageUri $c.model $c.tagRouting $c.replicas }}
{{- fail (printf "%s: the canary needs canary.percent; without it nothing of it is used." $at) }}
{{- end }}
{{- else }}
{{- if ne (and true (ne $c.storageUri "")) (and true (ne $s.storageUri "")) }}
{{- fail (printf "%s: the canary's model must come the same way as the service's: canary.storageUri for a storageUri, canary.model for a model." $at) }}
{{- end }}
{{- if and (not $c.storageUri) (not $c.model) }}
{{- fail (printf "%s: the canary needs a model of its own, canary.storageUri or canary.model." $at) }}
{{- end }}
{{- if and $c.storageUri $c.model }}
{{- fail (printf "%s: give one of canary.storageUri and canary.model." $at) }}
{{- end }}
{{- if $s.knative }}
{{- if $c.replicas }}
{{- fail (printf "%s: canary.replicas is for Standard mode; in Knative each revision scales by itself." $at) }}
{{- end }}
{{- else }}
{{- if not $root.Values.cluster.gatewayAPI }}
{{- fail (printf "%s: a canary percent in Standard mode needs KServe's Gateway API support (enableGatewayApi); without it KServe ignores it silently. Set cluster.gatewayAPI when it is on, or use Knative mode." $at) }}
{{- end }}
{{- if $c.tagRouting }}
{{- fail (printf "%s: canary.tagRouting is Knative's." $at) }}
{{- end }}
{{- if $s.multiNode.enabled }}
{{- fail (printf "%s: KServe has no canary for multi-node services." $at) }}
{{- end }}
{{- if $s.fetchedAdapters }}
{{- fail (printf "%s: KServe does not fetch adapters for a canary in Standard mode; give them as path." $at) }}
{{- end }}
{{- if and $c.replicas (gt (int $c.replicas) (int $s.min)) }}
{{- fail (printf "%s: canary.replicas %d is more than minReplicas %d, which KServe refuses." $at (int $c.replicas) (int $s.min)) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Ports and the objects around the pods. */}}
{{- if and $s.grpc.enabled $s.knative }}
{{- fail (printf "%s: Knative takes one port, and gRPC needs a second one beside HTTP; set deploymentMode: Standard." $at) }}
{{- end }}
{{- if and $s.podDisruptionBudget.enabled $s.knative }}
{{- fail (printf "%s: Knative manages its pods itself; podDisruptionBudget is for Standard mode." $at) }}
{{- end }}
{{- if and $s.networkPolicy.egressCIDRs (not $s.networkPolicy.restrictEgress) }}
{{- fail (printf "%s: networkPolicy.egressCIDRs does nothing without restrictEgress." $at) }}
{{- end }}
{{- end }}

{{/* The same for a runtime's extra arguments and environment. Takes (list $ kind). */}}
{{- define "kserve-vllm.checkRuntime" -}}
{{- $at := printf "runtimes.%s" (index . 1) -}}
{{- $runtime := index (index . 0).Values.runtimes (index . 1) -}}
{{- range $runtime.extraArgs }}
{{- $flag := regexReplaceAll "=.*" . "" | trimPrefix "--" | replace "_" "-" -}}
{{- if and (hasPrefix "--" .) (has $flag (list "model" "model-dir" "model-name" "served-model-name" "demo" "host" "port" "http-port" "grpc-port" "headless" "nnodes" "node-rank" "master-addr" "master-port" "tensor-parallel-size" "pipeline-parallel-size" "max-num-seqs" "drain-timeout" "drain-delay" "api-key")) }}
{{- fail (printf "%s: extraArgs has --%s, which belongs to each InferenceService or to the chart: targets, ports and grace are derived from it." $at $flag) }}
{{- end }}
{{- end }}
{{- if contains "{{" (toJson (list $runtime.extraArgs $runtime.env)) }}
{{- fail (printf "%s: two opening braces in extraArgs or env would be taken for a placeholder of KServe." $at) }}
{{- end }}
{{- range $runtime.env }}
{{- if has .name (list "PYTHONPATH" "PIPELINE_PARALLEL_SIZE" "TENSOR_PARALLEL_SIZE") }}
{{- fail (printf "%s: KServe refuses %s in the environment of a runtime." $at .name) }}
{{- end }}
{{- if and .value (regexMatch "(?i)(token|secret|password|api_?key)$" .name) }}
{{- fail (printf "%s: %s looks like a secret and is given as plain text; use valueFrom.secretKeyRef." $at .name) }}
{{- end }}
{{- end }}
{{- end }}
