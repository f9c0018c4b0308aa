FROM python:3.11-slim-bookworm
# --build-arg TORCH_INDEX_URL=… installs PyTorch from another index, for CPU-only wheels or another version of CUDA.
ARG TORCH_INDEX_URL=
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 VAR_DIR=/var/lib/llmtuner WEB_HOST=0.0.0.0 \
    MODEL_CACHE_DIR=/var/cache/llmtuner/models HF_HOME=/var/cache/llmtuner/huggingface
WORKDIR /app
COPY requirements.txt requirements.lock ./
RUN pip install --require-hashes --no-deps -r requirements.lock \
 && pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' requirements.txt)"
COPY . .
RUN useradd --system --create-home --home-dir /var/lib/llmtuner tuner \
 && install -d -o tuner /var/cache/llmtuner \
 && LLMTUNER_ENV=production SECRET_KEY=only-to-collect-static-files-during-the-build python manage.py collectstatic --noinput
USER tuner
EXPOSE 8420
CMD ["python", "-m", "llmtuner", "web"]
