#!/bin/sh
# Install the programs of others that tests/clients runs: each Python program's packages, as its first
# lines name them, in an environment of its own, and the packages of npm beside them.
set -eu
folder=$1
uv=${UV:-uv}
mkdir -p "$folder"
for program in tests/clients/programs/*.py; do
    name=$(basename "$program" .py)
    "$uv" venv --quiet --allow-existing "$folder/$name"
    "$uv" pip install --quiet --python "$folder/$name/bin/python" --requirements "$program"
done
"$uv" venv --quiet --allow-existing --python 3.11 "$folder/aider"
"$uv" pip install --quiet --python "$folder/aider/bin/python" aider-chat
if command -v npm >/dev/null; then
    # shellcheck disable=SC2046
    npm install --silent --prefix "$folder" @openai/codex @anthropic-ai/claude-code @qwen-code/qwen-code \
        @continuedev/cli opencode-ai $(sed -n 's#^// needs: ##p' tests/clients/programs/*.mjs)
fi
