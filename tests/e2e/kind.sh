#!/usr/bin/env bash
# A cluster in Docker for tests/e2e: kind, KServe, Knative Serving with Kourier, an Envoy gateway, and the CPU image.
#   tests/e2e/kind.sh up | test [pytest's arguments] | down
# Needs docker, kind, kubectl and helm on PATH (.tools/bin is looked at first), and a way out to GitHub and the registries.
# Cluster and image stay between runs; `down` removes the cluster.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PWD/.tools/bin:$PATH
NAME=${E2E_KIND_NAME:-kserve-vllm-e2e}
IMAGE=${E2E_IMAGE:-ghcr.io/kserve-vllm/kserve-vllm:$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' charts/kserve-vllm/Chart.yaml)-cpu}
KSERVE=${E2E_KSERVE:-v0.21.0}
KNATIVE=${E2E_KNATIVE:-knative-v1.21.0}
CERT_MANAGER=${E2E_CERT_MANAGER:-v1.18.2}
ENVOY_GATEWAY=${E2E_ENVOY_GATEWAY:-v1.5.4}
# Ports of this machine, and of the node that they lead to.
STANDARD_PORT=${E2E_STANDARD_PORT:-18080} KNATIVE_PORT=${E2E_KNATIVE_PORT:-18081}
STANDARD_NODE_PORT=31080 KNATIVE_NODE_PORT=31081
CONFIG=$(mktemp); trap 'rm -f "$CONFIG"' EXIT

k() { kubectl --context "kind-$NAME" "$@"; }
release() { echo "https://github.com/$1/releases/download/$2/$3"; }
apply() { k apply --server-side --force-conflicts -f "$@"; }     # KServe's CRDs are too large for a client-side apply
available() { k -n "$1" wait --for=condition=Available deployment --all --timeout=300s; }

cluster() {
  kind get clusters 2>/dev/null | grep -qx "$NAME" && return
  kind create cluster --name "$NAME" --wait 120s --config - <<Y
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes:
  - role: control-plane
    extraPortMappings:
      - {containerPort: $STANDARD_NODE_PORT, hostPort: $STANDARD_PORT, listenAddress: 127.0.0.1}
      - {containerPort: $KNATIVE_NODE_PORT, hostPort: $KNATIVE_PORT, listenAddress: 127.0.0.1}
Y
}

gateway() {
  helm --kube-context "kind-$NAME" upgrade --install eg oci://docker.io/envoyproxy/gateway-helm --version "$ENVOY_GATEWAY" \
    --namespace envoy-gateway-system --create-namespace --wait
  k create namespace kserve --dry-run=client -o yaml | k apply -f -
  apply - <<Y
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: EnvoyProxy
metadata: {name: node-port, namespace: envoy-gateway-system}
spec:
  provider:
    type: Kubernetes
    kubernetes:
      envoyService:
        type: NodePort
        patch: {type: StrategicMerge, value: {spec: {ports: [{name: http-80, port: 80, nodePort: $STANDARD_NODE_PORT}]}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: envoy}
spec:
  controllerName: gateway.envoyproxy.io/gatewayclass-controller
  parametersRef: {group: gateway.envoyproxy.io, kind: EnvoyProxy, name: node-port, namespace: envoy-gateway-system}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: kserve-ingress-gateway, namespace: kserve}
spec:
  gatewayClassName: envoy
  listeners: [{name: http, protocol: HTTP, port: 80, allowedRoutes: {namespaces: {from: All}}}]
Y
}

knative() {
  apply "$(release knative/serving "$KNATIVE" serving-crds.yaml)"
  apply "$(release knative/serving "$KNATIVE" serving-core.yaml)"
  apply "$(release knative-extensions/net-kourier "$KNATIVE" kourier.yaml)"
  k -n knative-serving patch configmap config-network --type merge -p '{"data": {"ingress-class": "kourier.ingress.networking.knative.dev"}}'
  k -n knative-serving patch configmap config-domain --type merge -p '{"data": {"example.com": ""}}'
  # The image is on the node and in no registry.
  k -n knative-serving patch configmap config-deployment --type merge -p "{\"data\": {\"registries-skipping-tag-resolving\": \"${IMAGE%%/*}\"}}"
  # What the chart's scenarios ask for and Knative has off.
  k -n knative-serving patch configmap config-features --type merge -p '{"data": {
    "kubernetes.podspec-nodeselector": "enabled", "kubernetes.podspec-tolerations": "enabled", "kubernetes.podspec-affinity": "enabled",
    "kubernetes.podspec-topologyspreadconstraints": "enabled", "kubernetes.podspec-runtimeclassname": "enabled",
    "kubernetes.podspec-priorityclassname": "enabled", "kubernetes.podspec-schedulername": "enabled", "kubernetes.podspec-fieldref": "enabled",
    "kubernetes.podspec-init-containers": "enabled", "kubernetes.podspec-persistent-volume-claim": "enabled"}}'
  k -n kourier-system patch service kourier --type merge -p "{\"spec\": {\"type\": \"NodePort\", \"ports\": [
    {\"name\": \"http2\", \"port\": 80, \"targetPort\": 8080, \"nodePort\": $KNATIVE_NODE_PORT}]}}"
  available knative-serving; available kourier-system
}

kserve() {
  apply "$(release cert-manager/cert-manager "$CERT_MANAGER" cert-manager.yaml)"
  available cert-manager
  apply "$(release kserve/kserve "$KSERVE" kserve.yaml)"
  available kserve
  k -n kserve get configmap inferenceservice-config -o json > "$CONFIG"
  python3 - "$CONFIG" <<'P' | k apply --server-side --force-conflicts -f -
import json, sys
config = json.load(open(sys.argv[1]))
ingress = json.loads(config["data"]["ingress"])
ingress.update(enableGatewayApi=True, disableIstioVirtualHost=True, ingressDomain="example.com")
config["data"]["ingress"] = json.dumps(ingress)
config["metadata"] = {key: config["metadata"][key] for key in ("name", "namespace")}
print(json.dumps(config))
P
  # The controller looks once, at its start, which kinds there are.
  k -n kserve rollout restart deployment; k -n kserve rollout status deployment --timeout=300s
}

image() {
  docker image inspect "$IMAGE" >/dev/null 2>&1 || docker build --target cpu --tag "$IMAGE" .
  kind load docker-image "$IMAGE" --name "$NAME"
}

case ${1:-} in
  up) cluster; gateway; knative; kserve; image ;;
  test)
    shift; kubectl config use-context "kind-$NAME" >/dev/null
    E2E_IMAGE=$IMAGE exec .venv/bin/python -m pytest tests/e2e --gateway "http://127.0.0.1:$STANDARD_PORT" \
      --knative-gateway "http://127.0.0.1:$KNATIVE_PORT" --versions "kserve=${KSERVE#v},knative=${KNATIVE#knative-v}" "$@" ;;
  down) kind delete cluster --name "$NAME" ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
