#!/usr/bin/env bash
# The runs of the README's comparison: three settings, six methods, five seeds; 64 joint actions a step everywhere.
# Two runs at a time on one thread each, 27 minutes on 2 cores. Then: python results/compare.py
# Learning rates are those of the best return of three (persistent) or two (official) trial runs per method (NOTES.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p out/comparison results/comparison
export OMP_NUM_THREADS=1

run() {
    case $1 in
        one) setting="--num_turns 1 --batch_size 64 --steps 8" ;;
        official) setting="--steps 6" ;;
        persistent) setting="--world persistent --reward sparse --steps 20" ;;
    esac
    case $2 in
        cc) method="train_cc.py --critic_lr 1e-3" ;;
        cc1) method="train_cc.py --critic_lr 1e-3 --lam 1" ;;
        dc) method="train_dc.py --critic_lr 1e-3" ;;
        group) method="train_mc.py" ;;
        none) method="train_mc.py --baseline none" ;;
        grpo) method="train_mc.py --num_agents 1" ;;
    esac
    case $1-$2 in persistent-cc* | persistent-dc | *-none) lr=1e-3 ;; *) lr=2e-3 ;; esac
    name=$1-$2-seed$3
    python $method $setting --lr $lr --seed $3 --out_dir out/comparison/$name --overwrite > out/comparison/$name.txt 2>&1
    cp out/comparison/$name/log.jsonl results/comparison/$name.jsonl
}
export -f run

for world in rebuilt persistent; do  # builds the tiny bases
    python train_cc.py --eval_only --world $world --out_dir out/comparison/base-$world
done
for seed in 1 2 3 4 5; do
    for setting in one official persistent; do
        for method in cc dc group none grpo cc1; do echo $setting $method $seed; done
    done
done | grep -v "one cc1\|official cc1" | xargs -P 2 -L 1 bash -c 'run "$@"' run
