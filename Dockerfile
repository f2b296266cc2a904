# CUDA runtime for training and evaluation. Not built yet: no Docker engine was at hand.
#
#   docker build -t medsam-adaptive .
#   mkdir -p data work_dir
#   docker run --rm -it --gpus all --user "$(id -u):$(id -g)" \
#       -v "$PWD/data:/app/data" -v "$PWD/work_dir:/app/work_dir" \
#       medsam-adaptive python train_adaptive.py --data data/flare22 --run NAME
#
# --user makes the files in data/ and work_dir/ yours. Ctrl-C stops a training as usual: the step is
# finished and the run is saved.
FROM pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime

ENV PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /app

# The image has torch and torchvision; pip keeps them, as they satisfy requirements.txt.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY . .
RUN useradd --create-home medsam && mkdir -p data work_dir && chown medsam data work_dir
USER medsam

CMD ["python", "train_adaptive.py", "--help"]
