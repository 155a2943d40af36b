# Sourced by the launch files beside it, in the repository's root: RECIPE CONFIG LAUNCH -> $script, $config, ${settings[@]}; and
# the options of a job that was put back -> ${words[@]}, of one that goes on.
# shellcheck shell=bash

# A launcher that is told to stop waits this long for its processes, which write a checkpoint first.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300

fail() {
    echo "error: $*" >&2
    exit 2
}

resolve() {
    local recipe=$1 launch=$3 found chapter
    python=.venv/bin/python
    [[ -f recipes/common/launch.py ]] || fail "start this in the root of the repository"
    [[ -x $python ]] || fail "there is no .venv here: make setup"

    found=(recipes/*/"$recipe".py)
    script=${found[0]}
    chapter=$(basename "$(dirname "$script")")
    [[ -f $script && $chapter != common ]] || fail "there is no recipe called $recipe (make list shows them all)"

    config=$2
    [[ $config == */* || $config == *.yaml ]] || config=configs/$chapter/$recipe/$config.yaml
    [[ -f $config ]] || fail "there is no config $config"

    [[ $launch != single && -f configs/accelerate/$launch.yaml ]] || fail "there is no launcher $launch for several machines (configs/accelerate)"
    # shellcheck disable=SC2034
    settings=(--config_file "configs/accelerate/$launch.yaml")
}

# A job that was put back goes on, however it was told to begin: --run.resume and --run.overwrite are read once, at its first start.
go_on() {
    words=()
    while [[ $# -gt 0 ]]; do
        case $1 in
        --run.resume | --run.overwrite) shift ;;
        --run.resume=* | --run.overwrite=*) ;;
        *) words+=("$1") ;;
        esac
        [[ $# -eq 0 ]] || shift
    done
    words+=(--run.resume true)
}
