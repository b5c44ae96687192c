# Recipes are thin: each is one command you could type. `just --list` shows them.

[private]
list:
    @{{just_executable()}} --list --unsorted

# the whole path on random weights, six families, with shape and type checks (about a minute)
smoke:
    uv run pytest -m smoke --dist load tests/test_smoke.py --jaxtyping-packages=ws,beartype.beartype

# honesty on the bundled model, offline: `just demo`, `just demo --adapter all`
demo *args:
    uv run ws demo {{args}}

# the pages in a browser (needs Debian's package chromium)
test-browser *args:
    uv run pytest -n 0 -m browser {{args}}

# exports in other people's programs: llama.cpp (built once: 7 minutes, needs cmake and g++) and mergekit
test-consumers *args:
    uv run pytest tests/export/test_export_gguf.py tests/export/test_mergekit.py -n 0 -m slow {{args}}

# the test suite; `just test -m slow` for the slow ones
test *args:
    uv run pytest {{args}}

# every reader against random damage (about ten minutes); `WS_FUZZ_SECONDS=200 just fuzz` for longer
fuzz *args:
    uv run pytest tests/files/test_damaged.py -m slow {{args}}

# do the tests notice faults planted in the core? `just mutate stats`; all five: 4400 mutants, an hour or more of one core
mutate *args:
    uv run --with mutmut==3.8.1 python tools/mutate.py {{args}}

# style, types and the import contract
lint:
    uv run ruff check .
    uv run ruff format --check .
    uv run mypy
    uv run lint-imports

# adapters x seeds x evaluations: `just sweep --model pocket --seeds 0 1 2`
sweep *args:
    uv run python -m ws.run_sweep {{args}}

# a sweep as a graph of jobs, on this machine, through pueue or on a ray cluster: `just queue --model pocket --workers 2`
queue *args:
    uv run ws queue {{args}}

# settings to train an adapter with, chosen on dev items: `just tune adapter=delora behavior=honesty`
tune *args:
    uv run ws tune {{args}}

# the strengths that cost 1 nat: `just calibrate adapter=delora behavior=honesty`
calibrate *args:
    uv run ws calibrate {{args}}

# shifts beside those of random vectors: `just controls adapter=delora behavior=honesty`
controls *args:
    uv run ws check controls {{args}}

# every way of steering at the same cost: `just compare behavior=honesty`
compare *args:
    uv run ws compare {{args}}

# what else a vector moves, on a board of traits: `just profile --behavior honesty --adapters lora`
profile *args:
    uv run python -m ws.analysis.profile {{args}}

# what else could have made a shift: `just confounds adapter=delora behavior=honesty`
confounds *args:
    uv run python -m ws.eval.confounds {{args}}

# where a vector lies in the base's weights: `just subspace adapter=delora behavior=honesty`
subspace *args:
    uv run python -m ws.subspace {{args}}

# how far a fine-tune has moved along known vectors: `just monitor ADAPTER --library VECTOR --benign BENIGN...`
monitor *args:
    uv run ws monitor {{args}}

# vectors added up: `just compose "honesty*1.0 + sycophancy*-0.5" --report`
compose expression *args:
    uv run ws compose "{{expression}}" {{args}}

# a smaller vector: `just trim adapter=lora --rank 4`
trim *args:
    uv run ws trim {{args}}

# the slope at alpha 0, from gradients: `just slope adapter=delora behavior=honesty`
slope *args:
    uv run ws check slope {{args}}

# everything a behaviour's runs have shown, as one page: `just report behavior=honesty`
report *args:
    uv run ws report {{args}}

# the base beside the steered model in a browser: `just play adapter=delora`
play *args:
    uv run ws play {{args}}

# the same in the terminal: `just chat adapter=lora --compare`
chat *args:
    uv run ws chat {{args}}

# a steered model for programs, as OpenAI's API has it: `just serve adapter=lora --port 8000`
serve *args:
    uv run ws serve {{args}}

# a vector in other formats: `just export merged adapter=delora alpha=0.5`, `just export peft`, `just export gguf-lora`
export format *args:
    uv run ws export {{format}} {{args}}

# publish a vector with its card: `just push user/name adapter=lora --dry-run`
push repo *args:
    uv run python -m ws.export.push {{repo}} {{args}}

# the vector between two full fine-tunes: `just diff --pos A --neg B --to FOLDER`
diff *args:
    uv run ws diff {{args}}

# AIRiskDilemmas on a finished run: `just eval-airisk adapter=delora behavior=honesty`
eval-airisk *args:
    uv run python -m ws.eval.airisk {{args}}

# tiny-mfv (airisk) on a finished run: `just eval-tinymfv-airisk adapter=delora behavior=honesty`
eval-tinymfv-airisk *args:
    uv run python -m ws.eval.tinymfv_airisk {{args}}

# held-out claims on a finished run: `just eval-sycophancy adapter=delora behavior=honesty`
eval-sycophancy *args:
    uv run python -m ws.eval.sycophancy {{args}}

# which of two given answers is likelier, on held-out questions: `just eval-preference adapter=delora behavior=mine.toml`
eval-preference *args:
    uv run python -m ws.eval.preference {{args}}

# statements that somebody with a trait would say: `just eval-statements adapter=delora --traits agreeableness`
eval-statements *args:
    uv run python -m ws.eval.statements {{args}}

# free answers, rated by a judge: `just eval-answers adapter=delora --judges Qwen/Qwen3-4B`
eval-answers *args:
    uv run python -m ws.eval.answers {{args}}

# TruthfulQA, MC1 and MC2: `just eval-truthfulqa adapter=delora --dataset TruthfulQA.csv`
eval-truthfulqa *args:
    uv run python -m ws.eval.truthfulqa {{args}}

# sums and word problems, at once and after a thought: `just eval-arithmetic adapter=delora --dataset sums`
eval-arithmetic *args:
    uv run python -m ws.eval.arithmetic {{args}}

# what steering costs on neutral text: `just eval-capability adapter=delora behavior=honesty`
eval-capability *args:
    uv run python -m ws.eval.capability {{args}}

# the results table of a behaviour's runs: `just summarize-airisk behavior=honesty`
summarize-airisk *args:
    uv run python -m ws.eval.readme_airisk_table {{args}}

# the documentation as a site, at http://127.0.0.1:8000
docs *args:
    NO_MKDOCS_2_WARNING=1 uv run mkdocs serve {{args}}

# one benchmark: `just bench vector`; `just bench all` for every comparison, then `just bench compare`
bench name *args:
    uv run python -m benchmarks.{{name}} {{args}}

# train the bundled model again (about half an hour on two cores)
build-pocket *args:
    uv run python tools/build_pocket.py {{args}}
