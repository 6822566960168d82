# The image of the trainer for clusters with GPUs. It is the image of `Dockerfile`, which must be built first and which
# TRAINER names, with three things that no wheel brings:
# - libibverbs and the providers of rdma-core. NCCL loads `libibverbs.so.1` while it starts, and uses InfiniBand or RoCE
#   only where that succeeds. Otherwise NCCL uses TCP.
# - DeepSpeed's `cpu_adam` as machine code: AdamW for optimizer state in the memory of the host. DeepSpeed would start a
#   compiler in the pod otherwise. The trainer does not use `cpu_adam` yet. The compiler is in the first stage only.
# - The capability IPC_LOCK on the file of the interpreter. Without it the kernel gives the capability of
#   `podTemplate.securityContext` to root only. In pods without the capability the mark does nothing. In pods with it, the
#   linker ignores LD_LIBRARY_PATH and LD_PRELOAD.
#
#     docker build -f trainer_image/gpu.Dockerfile --build-arg TRAINER=... -t ... .
ARG TRAINER=finetune-trainer
FROM ${TRAINER} AS compiled
USER 0
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libc6-dev libpython3-dev \
 && rm -rf /var/lib/apt/lists/*

# DeepSpeed compiles for the processor of the machine that builds. A node with an older processor would end the process
# with SIGILL, so the instructions are those of CPU_ARCH and CPU_VECTORS: AVX2 by default, which every server with GPUs
# of the last ten years has. On ARM: `--build-arg CPU_ARCH=armv8.2-a --build-arg CPU_VECTORS=NEON`.
# DS_ACCELERATOR is recorded in the package: DeepSpeed uses compiled operations only on the accelerator of that name.
ARG CPU_ARCH=x86-64-v3
ARG CPU_VECTORS=AVX256
COPY locks/trainer.txt /opt/finetune/locks/
RUN python3 -m venv /tmp/pip && mkdir /tmp/source \
 && sed -n '/^deepspeed==/,/[^\\]$/p' /opt/finetune/locks/trainer.txt > /tmp/deepspeed.txt \
 && export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 \
 && pip="/tmp/pip/bin/python -m pip --python /opt/venv/bin/python" \
 && $pip download --no-deps --no-build-isolation --no-binary :all: --require-hashes --dest /tmp -r /tmp/deepspeed.txt \
 && tar --extract --file /tmp/deepspeed-*.tar.gz --strip-components 1 --directory /tmp/source \
 && sed -i -e "s/-march=native/-march=${CPU_ARCH}/" -e "s/return '-D__[A-Z0-9]*__'/return '-D__${CPU_VECTORS}__'/" \
      /tmp/source/op_builder/builder.py \
 && $pip install --no-deps --no-build-isolation --force-reinstall /tmp/source

FROM ${TRAINER}
USER 0
# libgomp1 is what the compiler links OpenMP with. The libmlx5.so.1 of NVIDIA's network adapters is in ibverbs-providers.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libibverbs1 ibverbs-providers libgomp1 \
 && rm -rf /var/lib/apt/lists/*
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libcap2-bin \
 && setcap cap_ipc_lock=p "$(readlink --canonicalize /opt/venv/bin/python)" \
 && apt-get purge --yes libcap2-bin \
 && rm -rf /var/lib/apt/lists/*
COPY --from=compiled /opt/venv/lib/python3.11/site-packages/deepspeed /opt/venv/lib/python3.11/site-packages/deepspeed
# The build ends here where a pod could not load one of both.
RUN DS_ACCELERATOR=cuda /opt/venv/bin/python -c "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()" \
 && /opt/venv/bin/python -c "import ctypes; ctypes.CDLL('libibverbs.so.1'); ctypes.CDLL('libmlx5.so.1')" \
 && ! command -v g++ gcc cc
USER 65532:65532
