"""The stages of make.py, each skipping what it finds done."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from diffusers import AutoencoderKL
from tools.base_model import card, demo, evaluate, export, icons, unet, vae
from tools.base_model.presets import Preset

CANDIDATES = 3  # checkpoints that the best is chosen from
GUIDANCES = (2.0, 3.0, 4.5)


@dataclass
class Job:
    """One run of the script: everything is under `out`."""

    preset: Preset
    seed: int
    device: str
    out: Path
    compare: Path | None = None
    """Another model folder to score beside ours."""

    def run_icons(self) -> None:
        """Fetch the sets and render them."""
        icons.fetch(self.out / "npm")
        size = self.preset.pixels
        everything = (*icons.STYLES.values(), icons.UNSEEN)
        icons.render(self.out / "npm", self.out / f"icons{size}", size, everything)

    def run_vae(self) -> None:
        """Train the autoencoder."""
        folder = self.out / "vae"
        if not (folder / "config.json").exists():
            trained = vae.train(self.preset, self.seed, self.device, self.out)
            trained.save_pretrained(folder)

    def run_unet(self) -> None:
        """Train UNet and text encoder; their checkpoints are the result."""
        unet.train(self.preset, self.seed, self.device, self.out, self.autoencoder)

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        """The trained autoencoder, for inference."""
        return vae.load(self.out / "vae").to(self.device)

    def run_evaluate(self) -> None:
        """Choose the best checkpoint and guidance, score it on new seeds, draw the sheets."""
        if (self.out / "evaluation.json").exists() and (self.out / "model").exists():
            return
        newest_first = export.checkpoints(self.out)[: -CANDIDATES - 1 : -1]
        folders = [self.pipeline(c, self.out / "candidates" / c.stem) for c in newest_first]
        judge = evaluate.Judge(self.preset, self.seed, self.out)
        tried = evaluate.choose(judge, folders, GUIDANCES)
        winner = max(tried, key=lambda name: tried[name].share)
        checkpoint = self.out / "checkpoints" / f"{winner.split(' ')[0]}.safetensors"
        model = self.pipeline(checkpoint, self.out / "model")
        best, drawn = evaluate.score(judge, model, tried[winner].guidance, evaluate.REPORT_SEED)
        evaluate.sheet(drawn, 16, self.out / "sheets" / "concepts.png")
        card.sheets(model, best.guidance, self.out / "sheets")
        report = evaluate.Report(
            chosen=checkpoint.stem,
            best=best,
            ceiling=judge.ceiling(),
            tried=tried,
            compared=evaluate.read_best(self.out / "compared.json"),
            psnr=vae.fidelity(self.autoencoder, self.preset, self.out),
        )
        report.write(self.out / "evaluation.json")

    def pipeline(self, checkpoint: Path, folder: Path) -> Path:
        """A pipeline folder of a checkpoint."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        return export.from_checkpoint(self.preset, self.out, self.autoencoder, checkpoint, folder)

    def run_compare(self) -> None:
        """Score the other folder, if one was named, with the same prompts and seeds."""
        path = self.out / "compared.json"
        if self.compare is None or path.exists():
            return
        judge = evaluate.Judge(self.preset, self.seed, self.out)
        seed = evaluate.REPORT_SEED
        scores = [evaluate.score(judge, self.compare, g, seed)[0] for g in GUIDANCES]
        evaluate.write_scores(scores, path)

    def run_demo(self) -> None:
        """Write the demo's pictures and captions."""
        folder = self.out / f"icons{demo.SIZE}"
        icons.render(self.out / "npm", folder, demo.SIZE, [icons.UNSEEN])
        demo.write(icons.load(folder, icons.UNSEEN, demo.SIZE), self.out / "demo")

    def run_card(self) -> None:
        """Write the model card and its sheet into the model folder."""
        report = evaluate.Report.read(self.out / "evaluation.json")
        card.write(self.out / "model", self.out / "sheets", self.preset, self.device, report)

    def run_preview(self) -> None:
        """Make a model folder of the newest checkpoint, while training goes on."""
        newest = export.checkpoints(self.out)[-1]
        folder = self.out / "preview"
        self.pipeline(newest, folder)
        print(f"{folder}: {newest.stem} steps, {export.megabytes(folder):.1f} MB")
