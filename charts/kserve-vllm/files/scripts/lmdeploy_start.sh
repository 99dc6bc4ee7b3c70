# Starts LMDeploy's server on /mnt/models, or on what --model-path=... says. $0 is the program.
set -eu
model=/mnt/models
count=$#
while [ "$count" -gt 0 ]; do
  case "$1" in
    --model-path=*) model=${1#--model-path=} ;;
    *) set -- "$@" "$1" ;;
  esac
  shift
  count=$((count - 1))
done
exec "$0" serve api_server "$model" "$@"
