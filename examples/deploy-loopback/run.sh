#!/usr/bin/env bash
# A federation of three hospitals on one machine, secured as on many. Everything goes to ./run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/run}
rm -rf "$out" && mkdir -p "$out" && chmod 700 "$out" && cd "$out"
export FLWR_HOME=$out/flwr PYTHONPATH=$here FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 OMP_NUM_THREADS=1
mkdir "$FLWR_HOME"
link=${SUPERLINK_PORT:-8000} port=${GATEWAY_PORT:-8443}
started=()
# Only what this script started is ended, the last first.
trap 'for ((i = ${#started[@]} - 1; i >= 0; i--)); do kill "${started[i]}" 2>/dev/null && wait "${started[i]}" 2>/dev/null || true; done' EXIT
start() { local name=$1; shift; "$@" >"$name.log" 2>&1 & started+=($!); }
wait_for() { for _ in $(seq 240); do if "$@" >/dev/null 2>&1; then return 0; fi; sleep 0.5; done; echo "waited in vain for: $*" >&2; return 1; }

echo "1. certificates: an authority, one for the SuperLink, one for the gateway"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -keyout ca.key -out ca.crt \
    -subj "/CN=three hospitals" -addext keyUsage=critical,keyCertSign 2>/dev/null
for server in superlink gateway; do
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $server.key -out $server.csr \
        -subj "/CN=$server" 2>/dev/null
    openssl x509 -req -in $server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out $server.pem \
        -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n') 2>/dev/null
done
chmod 600 ./*.key

echo "2. the SuperLink, with TLS, and only for nodes that are registered"
start superlink flower-superlink --host 127.0.0.1 --port "$link" --database link.db --enable-supernode-auth \
    --ssl-ca-certfile ca.crt --ssl-certfile superlink.pem --ssl-keyfile superlink.key \
    --disable-runtime-dependency-installation
printf '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "localhost:%s"\nroot-certificates = "%s/ca.crt"\n' \
    "$link" "$out" >"$FLWR_HOME/config.toml"
wait_for curl -sf --cacert ca.crt "https://localhost:$link/health"

echo "3. who is who: keys of the gateway, of a clinic that asks under seal, and of three hospitals, compared by telephone"
mkdir -m 700 gateway-state north-home south-home west-home
printf '[queriers]\ngateway = "%s"\nclinic = "%s"\n' "$(fedinfer key gateway-state/gateway.id)" "$(fedinfer key clinic.id)" >pins.toml
printf '[sites]\n' >>pins.toml
for name in north south west; do printf '%s = "%s"\n' "$name" "$(fedinfer key $name-home)" >>pins.toml; done

echo "4. three hospitals: a node key, a policy, one command each"
for name in north south west; do
    ssh-keygen -q -t ecdsa -b 384 -N "" -f "$name.node"
    flwr supernode register "$name.node.pub" here --name "$name" >/dev/null
    sed "s/NAME/$name/g" "$here/policy.toml" | cat - pins.toml >"$name.toml"
    start "$name" fedinfer site up --policy "$name.toml" --superlink "localhost:$link" \
        --root-certificates ca.crt --node-key "$name.node"
done
fedinfer policy check north.toml

echo "5. the gateway, and a key for an application"
sed "s/PORT/$port/" "$here/gateway.toml" >gateway.toml
start gateway fedinfer serve --config "$out/gateway.toml" --superlink "localhost:$link" --root-certificates ca.crt
fedinfer gateway key create app --config gateway.toml --scope query --scope sealed --scope chat --scope status \
    --out app.key
wait_for curl -sf --cacert ca.crt "https://localhost:$port/ready"
FEDINFER_API_KEY=$(cat app.key)
export FEDINFER_API_KEY

echo "6. ask: with curl (the key from a file, not on the command line), under seal, and with the OpenAI SDK"
printf 'header = "Authorization: Bearer %s"\n' "$FEDINFER_API_KEY" >curl.conf && chmod 600 curl.conf
python - <<'PY'
import json, numpy as np
from sklearn.datasets import load_digits
x, y = load_digits(return_X_y=True)
rows = np.random.default_rng(0).permutation(len(x))[1400:1405]
np.save("digits.npy", x[rows] / 16.0)
json.dump({"model": "digits", "inputs": (x[rows[:1]] / 16.0).tolist()}, open("one.json", "w"))
print("truth:    ", *y[rows])
PY
curl -sf --cacert ca.crt --config curl.conf -H 'Content-Type: application/json' --data @one.json \
    "https://localhost:$port/v1/query" | python -c 'import json, sys; print("curl:     ", *json.load(sys.stdin)["answer"]["labels"])'
fedinfer query digits.npy --gateway "https://localhost:$port" --ca ca.crt --model digits --seal --protect secagg \
    --identity clinic.id --pins pins.toml --receipt receipt.json | python -c 'import json, sys; print("sealed:   ", *(json.loads(line)["label"] for line in sys.stdin))'
python "$here/ask.py" "https://localhost:$port" ca.crt

echo "7. what is left behind: a receipt, and a log at each hospital in which edits show"
fedinfer verify receipt.json --pins pins.toml >/dev/null && echo "the receipt verifies"
fedinfer verify north-home/audit.jsonl
