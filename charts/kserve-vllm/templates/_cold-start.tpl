{{/*
What a pod needs to find what was compiled for it before: environment, volume and mount of coldStart.cache. All are empty
without a claim or a folder of the node. The caches of vLLM and Triton lie in a folder of their own for each image, model and set of engine
flags, so that pods of two revisions never share one.
*/}}

{{/* Takes (list $ service); sets compiled in it, a dict with env, volumes and mounts. */}}
{{- define "kserve-vllm.service.coldStart" -}}
{{- $root := index . 0 -}}
{{- $s := index . 1 -}}
{{- $out := dict "env" list "volumes" list "mounts" list -}}
{{- $cache := $s.coldStart.cache -}}
{{- $place := dict "persistentVolumeClaim" (dict "claimName" $cache.claim) -}}
{{- if $cache.nodePath }}{{ $place = dict "hostPath" (dict "path" $cache.nodePath "type" "Directory") }}{{ end -}}
{{- if or $cache.claim $cache.nodePath -}}
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
{{- $_ := set $out "volumes" (list (merge (dict "name" "compiled") $place)) -}}
{{- $_ := set $out "mounts" (list (dict "name" "compiled" "mountPath" "/var/cache/kserve-vllm")) -}}
{{- end -}}
{{- $_ := set $s "compiled" $out -}}
{{- end }}

{{/* Takes a dict with s and at. */}}
{{- define "kserve-vllm.check.coldStart" -}}
{{- with .s.coldStart.cache }}
{{- if and .claim .nodePath }}
{{ printf "%s: coldStart.cache has both claim and nodePath; give the one that the caches are to lie in." $.at }}
{{- end }}
{{- end }}
{{- end }}
