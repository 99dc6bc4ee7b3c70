# Starts llama.cpp's server on the GGUF file in /mnt/models, whatever its name is; a service that names a model itself
# (--hf-repo) gets that one. $0 is the program, the arguments are the server's.
set -eu
for word in "$@"; do
  case "$word" in --hf-repo=*) exec_model=${word#--hf-repo=} ;; esac
done
# Its parser knows `--flag value`, not `--flag=value`.
count=$#
while [ "$count" -gt 0 ]; do
  word=$1
  shift
  case "$word" in
    --*=*) set -- "$@" "${word%%=*}" "${word#*=}" ;;
    *) set -- "$@" "$word" ;;
  esac
  count=$((count - 1))
done
if [ -n "${exec_model:-}" ]; then
  exec "$0" "$@"
fi
models=/mnt/models
# The first part of a model in several files is the one to name.
for file in "$models"/*-00001-of-*.gguf "$models"/*.gguf; do
  [ -f "$file" ] || continue
  case "$file" in
    *-00001-of-*) ;;
    *mmproj*) continue ;;
    *)
      if [ -n "${found:-}" ]; then
        echo "several GGUF models in $models ($found, $file): keep one of them there" >&2
        exit 1
      fi
      ;;
  esac
  found=$file
  case "$file" in *-00001-of-*) break ;; esac
done
if [ -z "${found:-}" ]; then
  echo "no GGUF file in $models: give a storageUri whose directory has one" >&2
  exit 1
fi
exec "$0" --model "$found" "$@"
