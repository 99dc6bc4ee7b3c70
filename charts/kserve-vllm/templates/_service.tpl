{{/*
Works an InferenceService out. Takes (list $ service): the entry over its defaults, with its name. Adds to it: mode,
knative, other (whether the engine is another than ours), facts (of that engine), kind (of runtime), runtimeName, sequences, stored, format, fetchedAdapters, sharedGpu, gpusNeeded, byClaim, gpus, startupBudget, timeout, drainTimeout,
drainDelay, grace, progressDeadline, class, metric, resourceMetric, min, max, target, canaryOn, files, engineArgs (head
and workers alike), args, flags (of Knative) and compiled (see _cold-start.tpl). It refuses nothing: see the _check-*.tpl.
*/}}
{{- define "kserve-vllm.service" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $mode := default $root.Values.cluster.deploymentMode $s.deploymentMode -}}
{{- $knative := eq $mode "Knative" -}}
{{- $_ := set $s "mode" $mode -}}
{{- $_ := set $s "knative" $knative -}}
{{- $kind := ternary "multinode" $s.device $s.multiNode.enabled -}}
{{- $_ := set $s "other" (ne $s.engine "kserve-vllm") -}}
{{- if $s.other }}{{ $kind = include "kserve-vllm.engine.kind" (list $root $s) }}{{ end -}}
{{- $_ := set $s "facts" (index $root.Values.internal.engines $s.engine | default dict) -}}
{{- $_ := set $s "kind" $kind -}}
{{- $extra := printf "extra.%s" $s.runtime -}}
{{- $runtimeName := $s.runtime -}}
{{- if not $s.runtime }}{{ $runtimeName = include "kserve-vllm.runtimeName" (list $root $kind) }}{{ end -}}
{{- if hasKey $root.Values.internal.runtimes $extra }}{{ $runtimeName = include "kserve-vllm.runtimeName" (list $root $extra) }}{{ end -}}
{{- $_ := set $s "runtimeName" $runtimeName -}}
{{- $fetched := list -}}
{{- range $s.lora.adapters }}{{ if .storageUri }}{{ $fetched = append $fetched . }}{{ end }}{{ end -}}
{{- $_ := set $s "fetchedAdapters" $fetched -}}
{{- $_ := set $s "stored" (or (ne $s.storageUri "") (ne $s.storage.path "")) -}}
{{- $_ := set $s "format" (default (ternary (ternary (printf "kserve-%s" $s.engine) "kserve-vllm" $s.other) "huggingface" $s.stored) $s.modelFormat) -}}
{{- $_ := set $s "canaryOn" (not (kindIs "invalid" $s.canary.percent)) -}}

{{/* GPUs: a share of one GPU (memory or cores) is still one device. */}}
{{- $tensor := int $s.parallelism.tensor -}}
{{- $pipeline := int $s.parallelism.pipeline -}}
{{- $_ := set $s "sharedGpu" (regexMatch "(gpu-?mem|gpu-?core|gpumem|gpucores)" ($s.gpu.resource | lower)) -}}
{{- $_ := set $s "gpusNeeded" (mul $tensor (int $s.parallelism.data) (ternary 1 $pipeline $s.multiNode.enabled)) -}}
{{- $_ := set $s "byClaim" (and (not (empty $s.resourceClaims)) (kindIs "invalid" $s.gpu.count)) -}}
{{- $_ := set $s "gpus" (ternary 0 (default $s.gpusNeeded $s.gpu.count) (or $s.byClaim (eq $s.device "cpu"))) -}}

{{/* Time. */}}
{{- $limit := int $root.Values.cluster.maxRevisionTimeoutSeconds -}}
{{- $_ := set $s "timeout" (int (default (ternary (min 600 $limit) 3600 $knative) $s.timeoutSeconds)) -}}
{{- $_ := set $s "drainTimeout" (int $s.drain.timeoutSeconds) -}}
{{- $_ := set $s "drainDelay" (ternary 0 10 $knative) -}}
{{- if not (kindIs "invalid" $s.drain.delaySeconds) }}{{ $_ := set $s "drainDelay" (int $s.drain.delaySeconds) }}{{ end -}}
{{- $drain := add (int $s.drainTimeout) (int $s.drainDelay) -}}
{{- $_ := set $s "grace" (ternary (int $s.timeout) (int (default (add $drain 30) $s.terminationGracePeriodSeconds)) $knative) -}}
{{- $_ := set $s "progressDeadline" (int (default $root.Values.runtimes.progressDeadlineSeconds $s.progressDeadlineSeconds)) -}}

{{- $_ := set $s "startupBudget" (int (include "kserve-vllm.startupBudget" $root)) -}}
{{- with $s.startupSeconds }}{{ $_ := set $s "startupBudget" (int .) }}{{ end -}}
{{- $_ := set $s "startupPeriod" (int $root.Values.runtimes.probes.startup.periodSeconds) -}}

{{/* Autoscaling. */}}
{{- $class := default (ternary "knative" "none" $knative) $s.autoscaling.class -}}
{{- $_ := set $s "class" $class -}}
{{- $metric := default (dict "knative" "concurrency" "hpa" "queue-depth" "keda" "queue-depth" "none" "" | dig $class "") $s.autoscaling.metric -}}
{{- $_ := set $s "metric" $metric -}}
{{- $min := int $s.autoscaling.minReplicas -}}
{{- $_ := set $s "min" $min -}}
{{- $_ := set $s "max" (int (default (ternary $min (max 3 $min) (eq $class "none")) $s.autoscaling.maxReplicas)) -}}
{{- $profiles := ($root.Files.Get "files/profiles.yaml" | fromYaml).maxNumSeqs -}}
{{- $seqs := int (default (ternary $s.facts.sequences (index $profiles $s.profile) $s.other) $s.maxNumSeqs) -}}
{{- $_ := set $s "sequences" $seqs -}}
{{- $targets := dict "concurrency" $seqs "queue-depth" 4 "kv-cache" 0.8 "ttft-p99" 2 "cpu" 80 "memory" 80 -}}
{{- $_ := set $s "target" (default (dig $metric 1 $targets) $s.autoscaling.target) -}}
{{- $_ := set $s "resourceMetric" (has $metric (list "cpu" "memory")) -}}

{{- include "kserve-vllm.service.files" $s -}}
{{- $ca := include "kserve-vllm.caFile" $root | fromJson -}}
{{- if $ca }}{{ $_ := set $s "files" (append $s.files $ca) }}{{ end -}}
{{- $_ := set $s "outwardEnv" (include "kserve-vllm.outwardEnv" $root | fromJsonArray) -}}
{{- include (ternary "kserve-vllm.engine.arguments" "kserve-vllm.service.arguments" $s.other) $s -}}
{{- include "kserve-vllm.service.coldStart" (list $root $s) -}}
{{- include "kserve-vllm.service.flags" (list $root $s) -}}
{{- end }}

{{/* Secrets and ConfigMaps that are mounted below /etc/kserve-vllm: name, secret or configMap, key, flag. */}}
{{- define "kserve-vllm.service.files" -}}
{{- $files := list -}}
{{- $template := index (.facts.flags | default dict) "chatTemplate.configMap" | default "--chat-template" | trimPrefix "--" -}}
{{- with .chatTemplate.configMap }}{{ $files = append $files (dict "name" "chat-template" "flag" $template "configMap" . "key" $.chatTemplate.key) }}{{ end -}}
{{- with .apiKeys.secretName }}{{ $files = append $files (dict "name" "keys" "flag" "keys-file" "secret" . "key" $.apiKeys.key) }}{{ end -}}
{{- range $name, $from := dict "adapters" .lora.watched "warmup" .warmup "moderation" .moderation -}}
{{- if $from.configMap }}{{ $files = append $files (dict "name" $name "flag" (printf "%s-file" $name) "configMap" $from.configMap "key" $from.key) }}{{ end -}}
{{- end -}}
{{- $_ := set . "files" $files -}}
{{- end }}

{{/* The command line. Head and workers of a multi-node service must agree on what shapes the engine. */}}
{{- define "kserve-vllm.service.arguments" -}}
{{- $engine := list (printf "--profile=%s" .profile) -}}
{{- if eq .task "embed" }}{{ $engine = append $engine "--runner=pooling" }}{{ end -}}
{{- with .maxModelLen }}{{ $engine = append $engine (printf "--max-model-len=%d" (int .)) }}{{ end -}}
{{- with .maxNumSeqs }}{{ $engine = append $engine (printf "--max-num-seqs=%d" (int .)) }}{{ end -}}
{{- if not .multiNode.enabled -}}
{{- if gt (int .parallelism.tensor) 1 }}{{ $engine = append $engine (printf "--tensor-parallel-size=%d" (int .parallelism.tensor)) }}{{ end -}}
{{- if gt (int .parallelism.pipeline) 1 }}{{ $engine = append $engine (printf "--pipeline-parallel-size=%d" (int .parallelism.pipeline)) }}{{ end -}}
{{- end -}}
{{- if gt (int .parallelism.data) 1 }}{{ $engine = append $engine (printf "--data-parallel-size=%d" (int .parallelism.data)) }}{{ end -}}
{{- with .quantization }}{{ $engine = append $engine (printf "--quantization=%s" .) }}{{ end -}}
{{- with .speculative }}{{ $engine = append $engine (printf "--speculative-config=%s" (toJson .)) }}{{ end -}}
{{- with .lora.adapters -}}
{{- $engine = append $engine "--enable-lora" -}}
{{- $engine = append $engine (printf "--max-loras=%d" (int (default (len .) $.lora.maxLoras))) -}}
{{- with $.lora.maxRank }}{{ $engine = append $engine (printf "--max-lora-rank=%d" (int .)) }}{{ end -}}
{{- end -}}
{{- $extra := list -}}
{{- range .extraArgs }}{{ $extra = append $extra (include "kserve-vllm.string" .) }}{{ end -}}
{{- $_ := set . "extraArgs" $extra -}}
{{- $_ := set . "engineArgs" (concat $engine $extra) -}}

{{- $args := list -}}
{{- if .demo }}{{ $args = append $args "--demo" }}{{ end -}}
{{- with .model }}{{ $args = append $args (printf "--model=%s" .) }}{{ end -}}
{{- if .fetchedAdapters }}{{ $args = append $args "--model=/mnt/models/base" }}{{ end -}}
{{- range .servedNames }}{{ $args = append $args (printf "--model-name=%s" (include "kserve-vllm.string" .)) }}{{ end -}}
{{- $args = concat $args $engine -}}
{{- with .lora.adapters -}}
{{- $args = append $args "--lora-modules" -}}
{{- range . }}{{ $args = append $args (printf "%s=%s" .name (default (printf "/mnt/models/adapters/%s" .name) .path)) }}{{ end -}}
{{- end -}}
{{- range .files }}{{ if .flag }}{{ $args = append $args (printf "--%s=/etc/kserve-vllm/%s/%s" .flag .name .key) }}{{ end }}{{ end -}}
{{- if gt (int .apiServerCount) 1 }}{{ $args = append $args (printf "--api-server-count=%d" (int .apiServerCount)) }}{{ end -}}
{{- if ne .responseCache "off" }}{{ $args = append $args (printf "--response-cache=%s" .responseCache) }}{{ end -}}
{{- with .usageSink }}{{ $args = append $args (printf "--usage-sink=%s" .) }}{{ end -}}
{{- with .tracing.endpoint }}{{ $args = append $args (printf "--otlp-endpoint=%s" .) }}{{ end -}}
{{- if not (kindIs "invalid" .tracing.sampleRatio) }}{{ $args = append $args (printf "--trace-sample-ratio=%v" .tracing.sampleRatio) }}{{ end -}}
{{- $args = append $args (printf "--drain-timeout=%d" (int .drainTimeout)) -}}
{{- if int .drainDelay }}{{ $args = append $args (printf "--drain-delay=%d" (int .drainDelay)) }}{{ end -}}
{{- $_ := set . "args" (concat $args $extra) -}}
{{- end }}

{{/* What Knative keeps behind a feature flag, of this service and of its runtime. Takes (list $ service). */}}
{{- define "kserve-vllm.service.flags" -}}
{{- $s := index . 1 -}}
{{- $flags := list -}}
{{- if $s.knative -}}
{{- $runtimes := (index . 0).Values.internal.runtimes -}}
{{- $runtime := index $runtimes $s.kind -}}
{{- $selector := or $runtime.nodeSelector (index . 0).Values.image.architecture -}}
{{- if $s.runtime }}{{ $selector = "" }}{{ $runtime = index $runtimes (printf "extra.%s" $s.runtime) | default (dict "env" list) }}{{ end -}}
{{- if or $s.nodeSelector $runtime.nodeSelector $selector }}{{ $flags = append $flags "kubernetes.podspec-nodeselector" }}{{ end -}}
{{- if or $s.tolerations $runtime.tolerations }}{{ $flags = append $flags "kubernetes.podspec-tolerations" }}{{ end -}}
{{- if or $s.affinity (and $s.gpu.products (eq $s.device "gpu")) }}{{ $flags = append $flags "kubernetes.podspec-affinity" }}{{ end -}}
{{- if $s.topologySpreadConstraints }}{{ $flags = append $flags "kubernetes.podspec-topologyspreadconstraints" }}{{ end -}}
{{- if $s.runtimeClassName }}{{ $flags = append $flags "kubernetes.podspec-runtimeclassname" }}{{ end -}}
{{- if $s.priorityClassName }}{{ $flags = append $flags "kubernetes.podspec-priorityclassname" }}{{ end -}}
{{- if $s.schedulerName }}{{ $flags = append $flags "kubernetes.podspec-schedulername" }}{{ end -}}
{{- if or $s.fetchedAdapters $s.initContainers }}{{ $flags = append $flags "kubernetes.podspec-init-containers" }}{{ end -}}
{{- if hasPrefix "pvc://" $s.storageUri }}{{ $flags = append $flags "kubernetes.podspec-persistent-volume-claim" }}{{ end -}}
{{- $claims := list -}}
{{- range concat (default list $runtime.extraVolumes) $s.compiled.volumes $s.extraVolumes -}}
{{- $volume := . -}}
{{- range $kind, $flag := dict "persistentVolumeClaim" "persistent-volume-claim" "hostPath" "volumes-hostpath" "csi" "volumes-csi" "image" "volumes-image" "ephemeral" "volumes-ephemeral" -}}
{{- if hasKey $volume $kind }}{{ $flags = append $flags (printf "kubernetes.podspec-%s" $flag) }}{{ end -}}
{{- end -}}
{{- if .persistentVolumeClaim }}{{ $claims = append $claims .name }}{{ end -}}
{{- end -}}
{{- range concat (default list $runtime.extraVolumeMounts) $s.compiled.mounts $s.extraVolumeMounts -}}
{{- if and (has .name $claims) (not .readOnly) }}{{ $flags = append $flags "kubernetes.podspec-persistent-volume-write" }}{{ end -}}
{{- end -}}
{{- range concat $s.env $runtime.env -}}
{{- if and (kindIs "map" .valueFrom) (or .valueFrom.fieldRef .valueFrom.resourceFieldRef) }}{{ $flags = append $flags "kubernetes.podspec-fieldref" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $_ := set $s "flags" ($flags | uniq) -}}
{{- end }}
