# Starts Ollama, makes the model known under the service's name and loads it; it ends when the server ends.
# --name=NAME is the service's, --model=MODEL one of Ollama's library in place of the GGUF file in /mnt/models.
# $0 is the program.
set -eu
name= model=
for word in "$@"; do
  case "$word" in
    --name=*) name=${word#--name=} ;;
    --model=*) model=${word#--model=} ;;
    *) echo "unknown argument $word: Ollama is set up by its environment" >&2; exit 1 ;;
  esac
done
"$0" serve &
server=$!
trap 'kill -TERM "$server" 2>/dev/null' TERM INT
tries=0
until "$0" list >/dev/null 2>&1; do
  tries=$((tries + 1))
  if [ "$tries" -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
    echo "Ollama did not start" >&2
    exit 1
  fi
  sleep 0.2
done
if [ -n "$model" ]; then
  "$0" pull "$model"
else
  for file in /mnt/models/*.gguf; do
    [ -f "$file" ] || { echo "no GGUF file in /mnt/models: give a storageUri whose directory has one" >&2; exit 1; }
    if [ -n "${found:-}" ]; then
      echo "several GGUF files in /mnt/models ($found, $file): keep one of them there" >&2
      exit 1
    fi
    found=$file
  done
  echo "FROM $found" > /tmp/Modelfile
  model=loading
  "$0" create "$model" -f /tmp/Modelfile
fi
# An empty prompt loads the model. Only then is it there under the name that the readiness probe asks for.
"$0" run "$model" "" >/dev/null
"$0" cp "$model" "$name"
"$0" run "$name" "" >/dev/null
# The first wait ends with the signal, the second one with the server.
wait "$server" || wait "$server"
