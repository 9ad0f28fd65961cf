#!/usr/bin/env bash
# The runs of COMPARISON.md: three settings, six methods, five seeds; up to 64 joint actions a step.
# Two runs at a time on one thread each, well over an hour on 2 cores. Then: python results/compare.py
# Learning rates are those of the best return of four (persistent) or two (official) trial runs per method (NOTES.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p out/comparison results/comparison
export OMP_NUM_THREADS=1

run() {
    case $1 in
        one) setting="--num_turns 1 --batch_size 64 --steps 8" ;;
        official) setting="--steps 6" ;;
        persistent) setting="--world persistent --reward sparse --steps 60" ;;
    esac
    case $2 in
        cc) method="train_cc.py --critic_lr 1e-3" ;;
        cc1) method="train_cc.py --critic_lr 1e-3 --lam 1" ;;
        dc) method="train_dc.py --critic_lr 1e-3" ;;
        group) method="train_mc.py" ;;
        none) method="train_mc.py --baseline none" ;;
        grpo) method="train_mc.py --num_agents 1" ;;
    esac
    case $1-$2 in
        persistent-cc) lr=2.5e-4 ;;
        persistent-cc1 | one-none | official-none) lr=1e-3 ;;
        persistent-*) lr=5e-4 ;;
        *) lr=2e-3 ;;
    esac
    name=$1-$2-seed$3
    out=out/comparison/$name
    python $method $setting --lr $lr --seed $3 --out_dir $out --overwrite > $out.txt 2>&1
    cp $out/log.jsonl results/comparison/$name.jsonl
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
