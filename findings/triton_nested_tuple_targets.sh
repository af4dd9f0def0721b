#!/usr/bin/env bash
# Triton 3.3 to 3.7: a jit function that unpacks a tuple within a tuple fails once, and is then compiled under a cache
# key that ignores its source.
#
# Versions: triton 3.4.0, 3.7.1 and 3.8.0 from PyPI, Linux x86-64, Python 3.11, no GPU, no torch. (3.3.1 behaves as
# 3.4.0 does; 3.5.1 and 3.6.0 as 3.7.1; 3.9.0 as 3.8.0.)
#
# Behaviour. `first, (second, third) = pair` in a function under @triton.jit:
#   3.4.0   every compilation raises TypeError: unhashable type: 'list'.
#   3.7.1   the first compilation in a process raises it. The second works, under the key "recursion:MODULE.NAME", which
#           was a placeholder until the real key was known. After an edit of the function the compiled code is the old
#           one: the key has not changed, so the cache on disk answers.
#   3.8.0   every compilation works, under a key made from the source.
# Cause: `DependenciesFinder.visitAssnTarget` in triton/runtime/jit.py (3.7.1, line 238) makes a set of a list that
# holds a list, and `JITFunction.cache_key` leaves its placeholder behind when that raises.
#
# What to do: unpack one level at a time: `first, rest = pair`, then `second, third = rest`.
#
# Output seen (2026-11-28), where "adds" is the constant in the compiled code:
#   3.4.0 source adds 7: TypeError unhashable type: 'list'; TypeError unhashable type: 'list'
#   3.4.0 source adds 8: TypeError unhashable type: 'list'; TypeError unhashable type: 'list'
#   3.7.1 source adds 7: TypeError unhashable type: 'list'; key recursion:kernel.add adds 7
#   3.7.1 source adds 8: TypeError unhashable type: 'list'; key recursion:kernel.add adds 7
#   3.8.0 source adds 7: key of the source adds 7; key of the source adds 7
#   3.8.0 source adds 8: key of the source adds 8; key of the source adds 8
#
# Exits with 1 and a diff if any of that has changed. Takes half a minute and 2 GB of a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3}

cat > "$folder/compile.py" <<'PYTHON'
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernel

seen = []
for _ in range(2):
    try:
        source = ASTSource(fn=kernel.add, signature={"p": "*i32", "a": "i32", "b": "i32", "c": "i32"}, constexprs={})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        key = kernel.add.cache_key
        key = "of the source" if re.fullmatch("[0-9a-f]{64}", key) else key
        constant = re.search(r"arith.constant (?:dense<)?(7|8)\b", compiled.asm["ttir"])[1]
        seen.append(f"key {key} adds {constant}")
    except TypeError as error:
        seen.append(f"TypeError {error}")
print(f"{triton.__version__} source adds {sys.argv[1]}: {'; '.join(seen)}")
PYTHON

for version in 3.4.0 3.7.1 3.8.0; do
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target "$folder/$version" \
    "triton==$version"
  for constant in 7 8; do
    cat > "$folder/kernel.py" <<PYTHON
import triton
import triton.language as tl


@triton.jit
def add(p, a, b, c):
    first, (second, third) = (a, (b, c))
    tl.store(p, first + second + third + $constant)
PYTHON
    PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$folder/$version:$folder" TRITON_CACHE_DIR="$folder/cache" \
      "$python" "$folder/compile.py" "$constant"
  done
done | tee "$folder/seen"

sed -n 's/^#   \(3\..* source adds .*\)/\1/p' "$0" | diff - "$folder/seen"
echo "as written above"
