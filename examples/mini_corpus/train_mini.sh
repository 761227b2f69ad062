#!/usr/bin/env bash
# Trains gpstoken-mini 2, stage by stage. Every stage goes on where it was stopped, and a finished one is passed over.
#
#   examples/mini_corpus/train_mini.sh --runs runs/mini2 [--device cpu|cuda] [--minutes M] [STAGE...]
#
# stages      what                                                        hours of two CPU cores
#   data      photographs, emoji, avatars                                  0.3
#   start     the tokenizer as principal components of regions             0.02
#   coarse    the tokenizer, 16 to 1,024 tokens, learning rate up           5
#   fine      the same, down to a learning rate of nothing                  4
# --device cuda runs the same steps with 8 times the pictures in each. --minutes ends each stage after so long.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
train=$here/../train
runs=runs/mini2 device=cpu minutes=100000 batch=2
stages=()
while [ $# -gt 0 ]; do
    case $1 in
        --runs) runs=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --minutes) minutes=$2; shift 2 ;;
        --help|-h) sed -n '2,12p' "$0"; exit 0 ;;
        -*) echo "unknown option $1; see --help" >&2; exit 1 ;;
        *) stages+=("$1"); shift ;;
    esac
done
case $device in
    cpu) launch="python" ;;
    cuda) launch="accelerate launch --mixed_precision bf16"; batch=16 ;;
    *) echo "--device must be cpu or cuda, got $device" >&2; exit 1 ;;
esac
[ ${#stages[@]} -gt 0 ] || stages=(data start coarse fine)
data=$runs/data cache=$runs/cache tokenizer=$runs/tokenizer

tokenizer_stage() {  # name, model to start from, steps, further options
    local name=$1 from=$2 steps=$3; shift 3
    local output=$tokenizer/$name resume=()
    if compgen -G "$output/checkpoint-*" > /dev/null; then resume=(--resume_from_checkpoint latest); fi
    $launch "$train/train_autoencoder.py" --output_dir "$output" --pretrained "$from" \
        --train_dir "$data/photographs/train" "$data/photographs/train" "$data/avatars/train" "$data/avatars/train" \
        "$data/emoji/train" \
        --validation_dir "$data/photographs/heldout" "$data/avatars/heldout" "$data/emoji/heldout" \
        --max_validation_images 12 --token_range 16 1024 --batch_size $batch --max_train_steps "$steps" \
        --l2_weight 4 --nested_share 0.25 --freeze linear --gradient_accumulation_steps 2 --ema_decay 0.999 --checkpointing_steps 50 --validation_steps 200 \
        --max_minutes "$minutes" --report_to none "${resume[@]}" "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
        data)
            python "$here/fetch_photographs.py" --output "$data/photographs" --cache "$cache"
            python "$here/fetch_emoji.py" --output "$data/emoji" --cache "$cache"
            python "$here/draw_avatars.py" --output "$data/avatars" --cache "$cache"
            ;;
        start)
            [ -e "$tokenizer/start/config.json" ] || python "$here/start_mini.py" --output "$tokenizer/start" \
                --train_dir "$data/photographs/train" "$data/photographs/train" "$data/avatars/train"
            ;;
        coarse)
            tokenizer_stage coarse "$tokenizer/start" 8000 --learning_rate 7e-4 --adam_learning_rate 2e-4 \
                --warmup_steps 100 --lr_schedule constant --seed 1
            ;;
        fine)
            tokenizer_stage fine "$tokenizer/coarse/model" 6000 --learning_rate 5e-4 --adam_learning_rate 1.5e-4 \
                --warmup_steps 50 --final_lr_scale 0 --seed 2
            ;;
        *) echo "unknown stage $stage; see --help" >&2; exit 1 ;;
    esac
done
