#!/usr/bin/env bash
# Trains gpstoken-mini 2, stage by stage. Every stage goes on where it was stopped, and a finished one is passed over.
#
#   examples/mini_corpus/train_mini.sh --runs runs/mini2 [--device cpu|cuda] [--minutes M] [STAGE...]
#
# stages      what                                                        hours of one CPU core
#   data      photographs, emoji, avatars of ten styles                     0.3
#   start     the tokenizer as principal components of regions              0.02
#   coarse    the tokenizer, 16 to 1,024 tokens, absolute and squared error 0.3
#   fine      the same by PSNR, so that dense pictures count as much        1.3
#   tokens    avatars as 128 tokens each                                    0.4
#   layout    the first stage of generation                                 2
#   texture   the second stage                                              5
#   assemble  the folder that DiffusionPipeline.from_pretrained opens       0.01
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
        --help|-h) sed -n '2,15p' "$0"; exit 0 ;;
        -*) echo "unknown option $1; see --help" >&2; exit 1 ;;
        *) stages+=("$1"); shift ;;
    esac
done
case $device in
    cpu) launch="python" ;;
    cuda) launch="accelerate launch --mixed_precision bf16"; batch=16 ;;
    *) echo "--device must be cpu or cuda, got $device" >&2; exit 1 ;;
esac
[ ${#stages[@]} -gt 0 ] || stages=(data start coarse fine tokens layout texture assemble)
data=$runs/data cache=$runs/cache tokenizer=$runs/tokenizer tokens=$runs/tokens
styles=(big-ears big-smile dylan fun-emoji lorelei miniavs personas pixel-art thumbs toon-head)

train() {  # script, output, further options
    local script=$1 output=$2 resume=(); shift 2
    if compgen -G "$output/checkpoint-*" > /dev/null; then resume=(--resume_from_checkpoint latest); fi
    $launch "$train/$script.py" --output_dir "$output" --max_minutes "$minutes" --report_to none \
        --final_lr_scale 0 "${resume[@]}" "$@"
}

tokenizer_stage() {  # name, model to start from, further options
    local name=$1 from=$2 photographs=$data/photographs avatars=$data/avatars; shift 2
    train train_autoencoder "$tokenizer/$name" --pretrained "$from" \
        --train_dir "$photographs/train" "$photographs/train" "$avatars/train" "$avatars/train" "$avatars/train" \
        "$data/emoji/train" --validation_dir "$photographs/heldout" "$avatars/heldout" "$data/emoji/heldout" \
        --max_validation_images 8 --token_range 16 1024 --batch_size "$batch" --nested_share 0.25 --freeze linear \
        --adam_learning_rate 2e-4 --warmup_steps 50 --ema_decay 0.998 --checkpointing_steps 150 --validation_steps 300 "$@"
}

generator_stage() {  # script, name, further options
    local script=$1 name=$2; shift 2
    train "$script" "$runs/$name" --train_dir "$tokens/train" --validation_dir "$tokens/heldout" \
        --batch_size $((12 * batch)) --warmup_steps 100 --checkpointing_steps 200 --validation_steps 1500 "$@"
}

for stage in "${stages[@]}"; do
    case $stage in
        data)
            python "$here/fetch_photographs.py" --output "$data/photographs" --cache "$cache"
            python "$here/fetch_emoji.py" --output "$data/emoji" --cache "$cache"
            python "$here/draw_avatars.py" --output "$data/avatars" --cache "$cache" --count 3000 --styles "${styles[@]}"
            ;;
        start)
            [ -e "$tokenizer/start/config.json" ] || python "$here/start_mini.py" --output "$tokenizer/start" \
                --train_dir "$data/photographs/train" "$data/photographs/train" "$data/avatars/train"
            ;;
        coarse)
            tokenizer_stage coarse "$tokenizer/start" --max_train_steps 1000 --learning_rate 1e-3 --l2_weight 4 --seed 1
            ;;
        fine)
            tokenizer_stage fine "$tokenizer/coarse/model" --max_train_steps 5300 --learning_rate 7e-4 \
                --l1_weight 0 --l2_weight 0 --psnr_weight 0.1 --seed 2
            ;;
        tokens)
            for split in train heldout; do
                $launch "$train/encode_dataset.py" --autoencoder "$tokenizer/fine/model" --data "$data/avatars/$split" \
                    --output "$tokens/$split" --num_tokens 128 --dtype bfloat16
            done
            ;;
        layout)
            echo '{"shared_modulation": true}' > "$runs/layout.json"
            generator_stage train_layout layout --config "$runs/layout.json" --min_region_size 4 --max_train_steps 10000
            ;;
        texture)
            echo '{"hidden_size": 256, "num_layers": 8, "num_attention_heads": 4, "shared_modulation": true}' \
                > "$runs/texture.json"
            generator_stage train_texture texture --config "$runs/texture.json" --emphasis 0.5 \
                --autoencoder "$tokenizer/fine/model" --max_train_steps 27000
            ;;
        assemble)
            python "$train/assemble_pipeline.py" --autoencoder "$tokenizer/fine/model" --layout_model "$runs/layout/model" \
                --transformer "$runs/texture/model" --tokens "$tokens/train" --output "$runs/pipeline"
            ;;
        *) echo "unknown stage $stage; see --help" >&2; exit 1 ;;
    esac
done
