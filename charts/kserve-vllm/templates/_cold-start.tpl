{{/*
What a pod needs to find what was compiled for it before: environment, volume and mount of coldStart.cache. All are empty
without a claim. The caches of vLLM and Triton lie in a folder of their own for each image, model and set of engine
flags, so that pods of two revisions never share one.
*/}}

{{/* Takes (list $ service); sets compiled in it, a dict with env, volumes and mounts. */}}
{{- define "kserve-vllm.service.coldStart" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $out := dict "env" list "volumes" list "mounts" list -}}
{{- with $s.coldStart.cache.claim -}}
{{- $image := $s.runtimeName -}}
{{- range $key := list $s.kind (printf "extra.%s" $s.runtime) -}}
{{- with index $root.Values.internal.runtimes $key -}}
{{- if eq $s.runtimeName (include "kserve-vllm.runtimeName" (list $root $key)) -}}
{{- $own := include "kserve-vllm.image" (list $root (ternary "cpu" "gpu" (eq .base "cpu"))) -}}
{{- $image = list (default $own .image) .extraArgs | toJson -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $source := list $image $s.model $s.storageUri $s.storage.path $s.demo $s.engineArgs $s.gpu.products -}}
{{- $folder := printf "/var/cache/kserve-vllm/%s" (sha256sum (toJson $source) | trunc 16) -}}
{{- $env := list -}}
{{- range $name, $below := dict "VLLM_CACHE_ROOT" "vllm" "TORCHINDUCTOR_CACHE_DIR" "torchinductor" "TRITON_CACHE_DIR" "triton" -}}
{{- $env = append $env (dict "name" $name "value" (printf "%s/%s" $folder $below)) -}}
{{- end -}}
{{- $_ := set $out "env" $env -}}
{{- $_ := set $out "volumes" (list (dict "name" "compiled" "persistentVolumeClaim" (dict "claimName" .))) -}}
{{- $_ := set $out "mounts" (list (dict "name" "compiled" "mountPath" "/var/cache/kserve-vllm")) -}}
{{- end -}}
{{- $_ := set $s "compiled" $out -}}
{{- end }}
