{{/* What ingress-nginx needs for streams: a token is passed on when it comes, an idle minute does not cut. Takes the route. */}}
{{- define "kserve-vllm.ingressAnnotations" -}}
nginx.ingress.kubernetes.io/proxy-buffering: "off"
nginx.ingress.kubernetes.io/proxy-request-buffering: "off"
nginx.ingress.kubernetes.io/proxy-body-size: "64m"
nginx.ingress.kubernetes.io/proxy-read-timeout: {{ int .timeoutSeconds | quote }}
nginx.ingress.kubernetes.io/proxy-send-timeout: {{ int .timeoutSeconds | quote }}
# A generation that was cut is not started a second time behind the caller's back.
nginx.ingress.kubernetes.io/proxy-next-upstream: "off"
{{- end }}
