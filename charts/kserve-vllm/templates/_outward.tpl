{{/* What a pod needs to reach the world: a private authority's certificates and a proxy, for services and cache Jobs alike. */}}

{{/* The file with the certificates, as in a service's `files`; empty without one. Takes $. Gives JSON. */}}
{{- define "kserve-vllm.caFile" -}}
{{- $ca := .Values.caBundle -}}
{{- $file := dict -}}
{{- with $ca.configMap }}{{ $file = dict "name" "ca" "configMap" . "key" $ca.key }}{{ end -}}
{{- with $ca.secretName }}{{ $file = dict "name" "ca" "secret" . "key" $ca.key }}{{ end -}}
{{- $file | toJson -}}
{{- end }}

{{/* Environment that says so: OpenSSL (Python's ssl, httpx), requests, curl, AWS. Takes $. Gives JSON. */}}
{{- define "kserve-vllm.outwardEnv" -}}
{{- $env := list -}}
{{- $file := include "kserve-vllm.caFile" . | fromJson -}}
{{- if $file -}}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "CURL_CA_BUNDLE" "AWS_CA_BUNDLE" -}}
{{- $env = append $env (dict "name" . "value" (printf "/etc/kserve-vllm/ca/%s" $file.key)) -}}
{{- end -}}
{{- end -}}
{{- $proxy := .Values.proxy -}}
{{- if or $proxy.httpProxy $proxy.httpsProxy -}}
{{- $direct := list "localhost" "127.0.0.1" "::1" ".svc" (printf ".%s" .Values.cluster.domain) -}}
{{- range $proxy.noProxy }}{{ $direct = append $direct (include "kserve-vllm.string" .) }}{{ end -}}
{{/* Some programs read the one spelling, some the other. */}}
{{- range $name, $value := dict "HTTP_PROXY" $proxy.httpProxy "HTTPS_PROXY" $proxy.httpsProxy "NO_PROXY" (join "," $direct) -}}
{{- if $value }}{{ $env = concat $env (list (dict "name" $name "value" $value) (dict "name" (lower $name) "value" $value)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $env | toJson -}}
{{- end }}

{{/* A file as a volume. Takes one of a service's `files`. */}}
{{- define "kserve-vllm.fileVolume" -}}
{{- if .secret -}}
{{- dict "name" .name "secret" (dict "secretName" .secret) | toJson -}}
{{- else -}}
{{- dict "name" .name "configMap" (dict "name" .configMap) | toJson -}}
{{- end -}}
{{- end }}

{{/* Of proxy and caBundle. Takes $. */}}
{{- define "kserve-vllm.check.outward" -}}
{{- range $name := list "httpProxy" "httpsProxy" }}
{{- if include "kserve-vllm.secretText" (index $.Values.proxy $name) }}
{{ printf "proxy.%s: it has a password in plain text; give HTTP_PROXY and HTTPS_PROXY as environment with valueFrom.secretKeyRef." $name }}
{{- end }}
{{- end }}
{{- if and .Values.caBundle.configMap .Values.caBundle.secretName }}
{{ printf "caBundle: give one of configMap and secretName." }}
{{- end }}
{{- end }}
