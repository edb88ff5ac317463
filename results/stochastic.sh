#!/usr/bin/env bash
# Would CARSO hold if its latent code mattered? Digits: which layers the purifier sees (all, or the last group alone),
# D 64 or 8, KL weight 1 or 0.01. Hours of one core; given again, it goes on where it was stopped.
#
#   bash results/stochastic.sh                # everything, for seeds 0, 1, 2
#   bash results/stochastic.sh "0"            # for some seeds
#   python -m results.stochastic              # then: the tables, and assets/agreement.png
set -euo pipefail
seeds=${1:-0 1 2}
run() { # 3: the audit failed, which is a result
  echo "== $*"
  python "$@" || [ $? = 3 ]
}
attack() { # NAME OUT OPTION...
  local name=$1 out=runs/$1/$2
  shift 2
  [ -f $out/report.md ] || run -m lab.evaluate --ckpt runs/$name/carso.pt --out $out --budget reduced --chunk 50 --steps 20 \
    --select 10 --draws 10 "$@"
}

for seed in $seeds; do
  for taps in all last; do
    for D in 64 8; do
      for KL in 1 0.01; do
        name=$taps-$D-$KL-$seed
        first=all-64-1-$seed
        options="--seed $seed --name $name --condition-dim $D --kl-end $KL"
        [ $name = $first ] || options="$options --classifier runs/$first/classifier.pt"
        [ $taps = all ] || options="$options --tap layer.2.*"
        [ -f runs/$name/carso.pt ] || run train.py $options
      done
    done
  done
done

R="--attack rand apgd-ce" # AutoAttack's APGD on two losses, and ours
# S = 8 under its own attack, at two radii.
for seed in $seeds; do
  for name in {last,all}-{64,8}-{1,0.01}-$seed; do
    attack $name S8-0.2 $R --eps 0.2 --pictures 100 --eot 1
    attack $name S8-0.1 $R --eps 0.1 --pictures 100 --eot 1
  done
done
# One seed. The purifier whose members disagree most: gradients of more draws.
for eot in 4 20 100; do
  attack last-8-1-0 eot$eot --attack apgd-ce --eps 0.2 --pictures 25 --eot $eot
done
# z = 0, S = 1, and the same codes for every picture, each under an attack of its own.
for name in {last,all}-8-1-0 {last,all}-64-1-0; do
  attack $name S0-0.2 $R --eps 0.2 --pictures 100 --samples 0
  attack $name fixed-0.2 $R --eps 0.2 --pictures 100 --control fixed-z
  attack $name S1-0.2 $R --eps 0.2 --pictures 100 --samples 1 --eot 8
done
# S = 32, and more steps.
attack last-8-1-0 S32-0.2 $R --eps 0.2 --pictures 50 --samples 32 --eot 1
for name in last-64-1-0 last-8-1-0; do
  attack $name S8-long $R --eps 0.2 --pictures 100 --eot 1 --steps 50
done
