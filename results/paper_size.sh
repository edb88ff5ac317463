#!/usr/bin/env bash
# The paper's recipe and the paper's purifier (D 512, Z 128, S 8) around a larger network, from the training to the
# attacks: once as in the paper, and once with a purifier that sees the last group of layers alone.
#
#   bash results/paper_size.sh small FILE.npz [SEED]  WRN-10-2, on 20,000 pictures an hour of one core: see RESULTS.md
#   bash results/paper_size.sh cpu FILE.npz [SEED]    WRN-16-4, on 20,000 pictures hours of one core
#   bash results/paper_size.sh gpu FILE.npz [SEED]    WRN-28-10, minutes of one H100, by calculation
#   bash results/paper_size.sh dry FILE.npz [SEED]    WRN-10-1 and the least of everything: whether all commands run
#
# FILE.npz: CIFAR-10's pictures, or others of 32x32, with MedMNIST's keys. Given again, it goes on where it was stopped.
set -euo pipefail
size=$1 data=$2 seed=${3:-0}
name=paper-size-$size-$seed
run() { # 3: the audit failed, which is a result
  echo "== $*"
  python "$@" || [ $? = 3 ]
}

# On a CPU without instructions for bfloat16 it takes many times as long as float32.
bf16=--bf16
[ $size = gpu ] || grep -qs bf16 /proc/cpuinfo || bf16=

case $size in
  small | cpu)
    case $size in
      small) network="--depth 10 --width 2" ;;
      cpu) network="--depth 16 --width 4" ;;
    esac
    classifier="$network --classifier-epochs 9 --classifier-batch-size 128 --classifier-learning-rate 0.1"
    purifier="--epochs 8 --batch-size 128 --learning-rate 4e-3 --learning-rate-end 4e-6 --attack-steps 10"
    pictures=200 some=60 few=10 steps=10 more="--chunk 50 --queries 500 --targets 3"
    ;;
  gpu)
    classifier="--depth 28 --width 10 --classifier-epochs 10 --classifier-batch-size 512 --classifier-learning-rate 0.2"
    purifier="--epochs 20 --batch-size 2048 --learning-rate 0.04 --learning-rate-end 5e-6 --attack-steps 10"
    pictures=200 some=200 few=32 steps=20 more="--chunk 200 --queries 1000 --targets 3"
    ;;
  dry)
    classifier="--depth 10 --width 1 --classifier-epochs 1"
    purifier="--epochs 1 --attack-steps 2"
    pictures=4 some=4 few=2 steps=2 more="--queries 4 --targets 1 --select 2 --draws 2"
    ;;
  *)
    echo "$0: SIZE $size is none of small, cpu, gpu, dry" >&2
    exit 2
    ;;
esac

# Both purifiers learn from the same pictures, which are attacked once.
common="--dataset $data --preset cifar10 $bf16 --seed $seed"
run train.py $common $classifier --stage classifier --name $name --classifier-ramp 2 --classifier-attack-steps 2 \
  --classifier-bn-momentum 0.1
purifier="$common $purifier --classifier runs/$name/classifier.pt"
run -m lab.attack_once --versions 1 $purifier --name $name-all
if [ ! -d runs/$name-last ]; then
  mkdir -p runs/$name-last
  cp -r runs/$name-all/attacked runs/$name-last/
fi
run -m lab.attack_once --versions 1 $purifier --name $name-last --tap 'layer.2.*'

reduced="--eps 8/255 $bf16 --budget reduced $more"
# The classifier under AutoAttack standard, and each CARSO under rand and our APGD.
for taps in all last; do
  run -m lab.evaluate --ckpt runs/$name-$taps/carso.pt $reduced --pictures $pictures --attack standard rand apgd-ce \
    --steps $steps --out runs/$name-$taps/eval-logsumexp
done
# The classifier under our APGD.
carso="--ckpt runs/$name-all/carso.pt $reduced"
out=runs/$name-all/eval
run -m lab.evaluate $carso --pictures $pictures --attack apgd --steps 50 --out $out-classifier --control classifier
# Through the authors' output.
run -m lab.evaluate $carso --pictures $some --attack rand apgd-ce --steps $steps --out $out-naive --view naive-odds
# S = 1 and z = 0 under attacks of their own, and S = 8 with one draw a gradient.
for S in 8 1 0; do
  run -m lab.evaluate $carso --pictures $some --attack apgd-ce --steps 50 --eot 1 --samples $S --out $out-S$S
done
# The paper's own budget, on few pictures.
run evaluate.py $carso --pictures $few --attack rand --steps 100 --eot 20 --select 60 --draws 20 --out $out-paper
