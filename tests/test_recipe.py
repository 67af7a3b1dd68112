"""Training on one's own data: what a batch holds, what learns, and that a step is a step however it is computed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, training_batch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map
from transformers import AutoModel, TrainingArguments

from sa2va import Sa2VAProcessor
from sa2va.data.export_scenes import export_scenes
from sa2va.data.registry import open_dataset
from sa2va.data.samples import Media, ObjectMasks, Polygons, Sample, Turn
from sa2va.finetune import merge, one_shot, recipe, train
from sa2va.finetune.collator import SampleCollator, choose_frames, choose_turns, seen_together
from sa2va.hub_upload import check_checkpoint

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "sa2va-tiny")
FAMILIES = ("ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl")
SAME_CURVE = 1e-4  # relative difference of losses that may come from the order of sums
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Scenes as JSONL: pictures, clips, regions and refusals; and chat without a picture."""
    folder = tmp_path_factory.mktemp("data")
    file = export_scenes(0, 2, folder, split="train", tasks=("multi", "absent", "region", "video_refer"), num_frames=7)
    turns = [{"question": "How are you?", "answer": "Fine."}, {"question": "Really?", "answer": "Yes."}]
    file.write_text(file.read_text() + json.dumps({"id": "chat", "turns": turns}) + "\n")
    return folder


@pytest.fixture(scope="module")
def samples(data) -> list[Sample]:
    """The same, opened."""
    dataset = open_dataset("jsonl", data, "train")
    return [dataset[index] for index in range(len(dataset))]


def command(data, output, **options) -> list[str]:
    """A short run of the recipe on the small checkpoint, without chance."""
    options = {
        "model": TINY,
        "data": f"jsonl:{data}",
        "output_dir": output,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 9,
        "preview_steps": STEPS,
        "previews": 1,
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def curve(output: Path, step: int = STEPS) -> list[dict]:
    """What was logged up to a checkpoint."""
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def losses(output: Path) -> list[float]:
    """Losses of all steps."""
    return [entry["loss"] for entry in curve(output)]


def parts(output: Path) -> list[dict[str, float]]:
    """Parts of the loss in all steps."""
    return [{name: entry[name] for name in recipe.LOSS_PARTS if name in entry} for entry in curve(output)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run that nothing interrupted, in one process."""
    output = tmp_path_factory.mktemp("whole")
    train.main(command(data, output))
    return output


@pytest.fixture(scope="module")
def one_by_one(data, tmp_path_factory) -> Path:
    """The same run in batches of one sample, four of which make a step, on one thread."""
    output, threads = tmp_path_factory.mktemp("one_by_one"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.main(command(data, output, per_device_train_batch_size=1, gradient_accumulation_steps=4, preview_steps=0))
    finally:
        torch.set_num_threads(threads)
    return output


# ---------- batches


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers_and_prompts_those_of_prediction(family, samples):
    processor = Sa2VAProcessor.from_pretrained(GOLDEN / family)
    sample = next(s for s in samples if s.id.startswith("multi"))
    batch = SampleCollator(processor)([(0, sample)])
    kept = batch["input_ids"][0][batch["labels"][0] != -100]
    answers = [turn.answer + processor.stop_words[0] for turn in sample.turns]
    wanted = [i for text in answers for i in processor.tokenizer(text, add_special_tokens=False).input_ids]
    assert kept.tolist() == wanted
    asked = processor.prepare(image=sample.media.read([0])[0], text=sample.turns[0].question).input_ids[0]
    assert torch.equal(batch["input_ids"][0, : len(asked)], asked)


@pytest.mark.slow
@pytest.mark.parametrize("family", ("ivl_internlm2", "qwen25vl", "qwen3vl"))
def test_every_family_learns_from_pictures_clips_and_chat_in_one_batch(family, samples):
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32)
    chosen = [s for s in samples if s.id in ("multi_00000", "video_refer_00000", "chat")]
    batch = SampleCollator(model.load_processor())(list(enumerate(chosen)))
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss) and output.mask_loss > 0
    assert [len(masks) for masks in output.pred_masks] == [sum(len(t.objects) for t in s.turns) for s in chosen]
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_what_is_drawn_follows_from_the_place_in_the_stream(samples):
    processor = Sa2VAProcessor.from_pretrained(TINY)
    clip = next(s for s in samples if s.media.is_video)

    def frames(seed, index):
        return SampleCollator(processor, seed, num_frames=3)([(index, clip)])["pixel_values"]

    assert torch.equal(frames(0, 5), frames(0, 5)) and frames(0, 5).shape[0] == 3
    assert len({frames(seed, index).sum().item() for seed in range(2) for index in range(4)}) > 2


def test_frames_are_drawn_where_all_objects_are_annotated_and_regions_are_marked():
    clip, rng = Media(tuple(Path(f"{i}.png") for i in range(9)), is_video=True), np.random.default_rng(0)
    labelled = [ObjectMasks({}, frozenset({0, 2, 4, 6, 8})), ObjectMasks({}, frozenset({2, 4, 6}))]
    assert choose_frames(clip, labelled, 5, rng) == [2, 4, 6]
    drawn = choose_frames(clip, [], 5, rng, with_first=True)
    assert drawn[0] == 0 and drawn == sorted(set(drawn)) and len(drawn) == 5
    with pytest.raises(ValueError, match="no frame"):
        choose_frames(clip, [ObjectMasks({}, frozenset())], 5, rng)
    with pytest.raises(ValueError, match="frame 0"):
        choose_frames(clip, labelled[1:], 5, rng, with_first=True)


def test_of_independent_expressions_those_are_learned_that_were_annotated_together():
    rng = np.random.default_rng(0)
    turns = [Turn(name, "[SEG]", (ObjectMasks({}, frozenset({frame})),)) for name, frame in (("a", 0), ("b", 1))]
    drawn = {tuple(turn.question for turn in seen_together(turns, 2, rng)) for _ in range(20)}
    assert drawn == {("a",), ("b",)}
    together = [turns[0], Turn("c", "[SEG]", (ObjectMasks({}, frozenset({0, 1})),))]
    assert seen_together(together, 2, rng) == together
    talk = [*turns, Turn("What is it?", "A thing.")]  # its turns may depend on each other
    assert seen_together(talk, 2, rng) == talk


def test_captions_to_compare_with_are_nothing_to_learn(samples):
    dataset = open_dataset("gcg", ROOT / "data" / "examples" / "gcg", "val")
    with pytest.raises(ValueError, match="only captions to compare with"):
        SampleCollator(Sa2VAProcessor.from_pretrained(TINY))([(0, dataset[0])])


def test_batches_of_workers_are_taken_out_of_shared_memory():
    """Each shared tensor holds a file open, of which a process may have few."""
    shared = {"labels": torch.ones(2).share_memory_(), "mask_labels": [torch.ones(2).share_memory_(), None]}
    own = recipe._in_own_memory(shared)
    assert not own["labels"].is_shared() and not own["mask_labels"][0].is_shared()
    assert own["mask_labels"][1] is None and torch.equal(own["labels"], shared["labels"])


@pytest.mark.parametrize("name", ["save", "eval", "logging"])
def test_what_happens_after_every_epoch_happens_after_so_many_steps(data, samples, tmp_path, name):
    """To `Trainer` all steps are one epoch."""
    options = {"max_steps": -1, "num_train_epochs": 3, f"{name}_strategy": "epoch", "eval_split": "train"}
    _, training, _ = recipe.parse_arguments(command(data, tmp_path, **options))
    mixture = recipe.plan_mixture({"all": samples}, None, training)
    steps = round(len(samples) / 4)
    assert getattr(training, f"{name}_strategy") == "steps" and getattr(training, f"{name}_steps") == steps
    assert training.max_steps == -(-3 * len(samples) // 4) == len(mixture) / 4


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_all_that_learns_gets_a_gradient_from_any_batch(picture, alone, targets):
    """Processes that train together wait for it; pictures have no use for memory, which the second targets reach."""
    model = AutoModel.from_pretrained(GOLDEN / "ivl_qwen2", dtype=torch.float32)
    processor = model.load_processor()
    recipe.run_idle_parts(model)
    model = recipe.prepare_model(model, recipe.RecipeArguments("M", lora_rank=2, lora_targets=targets)).train()
    model(**training_batch(processor, picture)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_independent_expressions_beyond_five_objects_are_left_out():
    rng = np.random.default_rng(0)
    turns = [Turn(f"{i}", None, (ObjectMasks({}),) * 2) for i in range(4)]
    drawn = [[turn.question for turn in choose_turns(turns, 5, rng)] for _ in range(20)]
    assert all(len(d) == 2 and d == sorted(d) for d in drawn) and len({tuple(d) for d in drawn}) > 2
    talk = [*turns, Turn("What is it?", "A thing.")]  # its turns may depend on each other
    assert choose_turns(talk, 5, rng) == talk[:2]
    assert choose_turns([Turn("All?", None, (ObjectMasks({}),) * 7)], 5, rng)


def test_a_sample_that_can_not_be_learned_from_is_named(samples):
    collate = SampleCollator(Sa2VAProcessor.from_pretrained(TINY))
    picture = next(s for s in samples if not s.media.is_video).media
    box = ObjectMasks({0: Polygons.box(0, 0, 9, 9)})
    with pytest.raises(ValueError, match=r"'odd'.*2 \[SEG\].*1 objects"):
        collate([(0, Sample("odd", picture, (Turn("Where?", "[SEG] [SEG]", (box,)),)))])
    with pytest.raises(ValueError, match="'gone'"):
        collate([(0, Sample("gone", Media((Path("gone.png"),)), (Turn("Where?", None, (box,)),)))])
    with pytest.raises(ValueError, match=r"'kept'.*neither answer nor objects"):
        collate([(0, Sample("kept", picture, (Turn("Where?", None),)))])
    collate.max_length = 50
    with pytest.raises(ValueError, match=r"'long'.*max_length=50 leaves nothing to learn"):
        collate([(0, Sample("long", picture, (Turn("Where?", None, (box,)),)))])


# ---------- the recipe


def test_defaults_are_those_of_the_paper(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    ours, theirs, data = recipe.parse_arguments(["--model", "M", "--data", "a:b", "c:d", "--data", "e:f"])
    assert data == ["a:b", "c:d", "e:f"]
    assert (ours.lora_rank, ours.lora_alpha, ours.frames, ours.objects) == (256, 512, 5, 5)
    assert (theirs.learning_rate, theirs.weight_decay, theirs.max_grad_norm) == (4e-5, 0.05, 1.0)
    assert (theirs.adam_beta1, theirs.adam_beta2, theirs.lr_scheduler_type) == (0.9, 0.999, "cosine")
    assert theirs.get_warmup_steps(1000) == 50
    assert theirs.per_device_train_batch_size * theirs.gradient_accumulation_steps * 4 == 256


def test_data_is_named_in_words_or_in_a_file(data, tmp_path):
    entry = {"name": "jsonl", "root": str(data), "weight": 3, "split": "train"}
    (tmp_path / "mixture.json").write_text(json.dumps({"datasets": [entry]}))
    plain = [f"jsonl:{data}"]
    datasets, weights = recipe.open_datasets(plain, "train")
    assert [len(d) for d in datasets.values()] == [9] and weights is None
    datasets, weights = recipe.open_datasets([*plain, f"jsonl:{data}:0.5", str(tmp_path / "mixture.json")], "train")
    assert list(weights.values()) == [1.0, 0.5, 3.0] and len(datasets) == 3
    for wrong in ("jsonl", ":x", "jsonl:"):
        with pytest.raises(ValueError, match="NAME:FOLDER"):
            recipe.open_datasets([wrong], "train")


@pytest.mark.parametrize(
    ("family", "decoder", "kept"),
    [
        ("ivl_internlm2", "sam_mask_decoder.", 5),
        ("sa2vai_qwen2", "sam_mask_decoder_modified.", 5),
        ("qwen3vl", "sam_mask_decoder.", 4),
    ],
)
def test_what_learns(family, decoder, kept):
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.bfloat16)
    model.config.iou_loss_weight, model.config.object_score_loss_weight = 0.0, 1.0
    wrapped = recipe.prepare_model(model, recipe.RecipeArguments(model="M", lora_rank=2))
    learned = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    adapted = {name for name in learned if "lora_" in name}
    assert all(".layers." in name and "language_model." in name for name in adapted)
    assert {name.split(".")[-4] for name in adapted} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len({name.partition(".modules_to_save")[0] for name in learned.keys() - adapted}) == kept
    assert any(decoder in name for name in learned)
    assert any("pred_obj_score_head" in name for name in learned)
    assert not any("iou_prediction_head" in name or "image_encoder" in name for name in learned)
    assert all(p.dtype == torch.float32 for p in learned.values())


def test_without_an_adapter_the_language_model_learns_in_full():
    model = AutoModel.from_pretrained(TINY)
    same = recipe.prepare_model(model, recipe.RecipeArguments(model="M", lora_rank=0, train_modules=["mask_decoder"]))
    learned = {name for name, p in same.named_parameters() if p.requires_grad}
    assert same is model and {name.split(".")[0] for name in learned} == {"language_model", "grounding_encoder"}
    with pytest.raises(ValueError, match="no nonsense"):
        recipe.prepare_model(model, recipe.RecipeArguments(model="M", train_modules=["nonsense"]))


def test_a_run_logs_every_loss_and_shows_what_is_answered(whole):
    first = curve(whole)[0]
    config = AutoModel.from_pretrained(TINY).config
    weights = {name: getattr(config, f"{name}_weight", 1.0) for name in recipe.LOSS_PARTS}
    assert first["loss"] == pytest.approx(sum(weight * first[name] for name, weight in weights.items()), rel=1e-4)
    assert [file.name for file in (whole / "previews").iterdir()] == [f"step-{STEPS:06d}-0.png"]


def test_a_step_is_the_same_in_one_batch_and_in_several(whole, one_by_one):
    assert losses(one_by_one) == pytest.approx(losses(whole), rel=SAME_CURVE)


@pytest.mark.slow
def test_two_processes_learn_as_one_does(data, whole, one_by_one, tmp_path):
    arguments = command(data, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, preview_steps=0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, str(ROOT / "finetune" / "train.py"), *arguments], check=True, timeout=600)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=SAME_CURVE)
    norms, wanted = ([entry["grad_norm"] for entry in curve(output)] for output in (tmp_path, whole))
    assert norms == pytest.approx(wanted, rel=SAME_CURVE)
    # Small parts, as `iou_loss`, change with the size of a batch and the number of threads; launched, there is one.
    assert parts(tmp_path) == [pytest.approx(step, rel=SAME_CURVE, abs=2e-6) for step in parts(one_by_one)]  # rounded


SHARDED = """
import os, sys
from datetime import timedelta
from types import SimpleNamespace
import numpy as np, torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from conftest import GOLDEN, training_batch
from PIL import Image
from transformers import AutoModel
from sa2va.finetune import recipe

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
os.environ["ACCELERATE_USE_FSDP"] = "true"
model = AutoModel.from_pretrained(GOLDEN / sys.argv[1], dtype=torch.float32)
processor, is_first = model.load_processor(), dist.get_rank() == 0
recipe.run_idle_parts(model, is_sharded=True)
model = recipe.prepare_model(model, recipe.RecipeArguments(model=sys.argv[1], lora_rank=4, lora_alpha=8))
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
plugin.set_mixed_precision("bf16")
place = {"device": torch.device("cpu"), "is_main_process": is_first, "torch_device_mesh": None}
state = SimpleNamespace(fsdp_plugin=plugin)
model = fsdp2_prepare_model(SimpleNamespace(state=state, mixed_precision="bf16", **place), model)
if is_first:
    batch = training_batch(processor, Image.fromarray(np.zeros((61, 97, 3), np.uint8)))
else:
    ids = processor.prepare(text="Hi?").input_ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch |= {"grounding_pixel_values": [None], "mask_labels": [None]}
model.train()
model(**batch).loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
model.eval()
with torch.no_grad():
    assert model(**batch).loss > 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_sharded_processes_with_and_without_pictures_wait_for_each_other(family, tmp_path):
    """FSDP2 in bfloat16, as finetune/accelerate/fsdp.yaml has it, over two processes: one has a picture, one words."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "sharded.py", family], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


class Noted(torch.autograd.Function):
    """The tensor itself, and a note when its gradient comes."""

    @staticmethod
    def forward(ctx, tensor, order, name):
        ctx.order, ctx.name = order, name
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.order.append(f"back {ctx.name}")
        return gradient, None, None


def trace(model, batch) -> list[str]:
    """Which parts run, and which get gradients of what they gave, in order: ZeRO-3 wants it alike in all processes."""
    order: list[str] = []
    handles = []

    def watch(name, module):
        def noted(value):
            return Noted.apply(value, order, name) if isinstance(value, torch.Tensor) and value.requires_grad else value

        handles.append(module.register_forward_pre_hook(lambda *_: order.append(f"run {name}")))
        handles.append(module.register_forward_hook(lambda module, args, output: tree_map(noted, output)))

    for name, module in model.named_modules():
        if ".grounding_encoder." not in name:  # one piece, see finetune/accelerate/zero3.yaml
            watch(name, module)
    model.zero_grad()
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return order


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_parts_run_in_one_order_whatever_a_batch_holds(family, picture, alone):
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32)
    processor = model.load_processor()
    recipe.run_idle_parts(model)
    modules = [*recipe.RecipeArguments("M").train_modules, *(["merger"] if family == "qwen3vl" else [])]
    model = recipe.prepare_model(model, recipe.RecipeArguments("M", lora_rank=2, train_modules=modules)).train()
    seen = training_batch(processor, picture)
    clip = seen | {"grounding_pixel_values": [seen["grounding_pixel_values"][0].expand(3, -1, -1, -1)]}
    clip["mask_labels"] = [torch.ones(1, 3, 61, 97)]
    ids = processor.prepare(text="Hi?").input_ids
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    nothing = {"grounding_pixel_values": [None], "mask_labels": [None]}
    hidden = seen | {"labels": seen["labels"].masked_fill(seen["labels"] == model.special_token_ids().seg, -100)}
    wanted = trace(model, seen)
    for batch in (clip, words, words | nothing, hidden | nothing):
        assert trace(model, batch) == wanted
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_an_adapter_is_whole_though_zero3_leaves_out_what_is_frozen(tmp_path):
    base = str(GOLDEN / "ivl_qwen2")
    model = recipe.prepare_model(AutoModel.from_pretrained(base), recipe.RecipeArguments(base, lora_rank=2))
    trainer = recipe.RecipeTrainer(
        settings={}, model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    )
    trainer.is_deepspeed_enabled = True
    trainer._save(str(tmp_path / "adapter"), {n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    merge.merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    assert check_checkpoint(tmp_path / "merged").ok


def test_one_process_writes_the_result_alone_with_zero3(whole, tmp_path, monkeypatch):
    config = SimpleNamespace(is_zero3=lambda: True)  # so transformers would make models in all processes together
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, wait_for_everyone=lambda: None)
    trainer = SimpleNamespace(accelerator=accelerator, model=None, is_fsdp_enabled=False)
    trainer.is_world_process_zero = lambda: True
    trainer.save_model = partial(shutil.copytree, whole / f"checkpoint-{STEPS}")
    with monkeypatch.context() as patched:
        patched.setattr(transformers.integrations.deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
        final = recipe.save_result(trainer, TINY, tmp_path)
        assert transformers.integrations.deepspeed.is_deepspeed_zero3_enabled()
    assert check_checkpoint(final).ok


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, whole, tmp_path):
    arguments = [*command(data, tmp_path, preview_steps=0), "--resume"]
    run = subprocess.Popen([sys.executable, str(ROOT / "finetune" / "train.py"), *arguments])
    begun = time.monotonic()
    while recipe.newest_checkpoint(tmp_path) is None and run.poll() is None and time.monotonic() < begun + 300:
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.5))  # anywhere in the steps that follow, or in saving one
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert recipe.newest_checkpoint(tmp_path)
    train.main(arguments)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=SAME_CURVE)
    assert parts(tmp_path) == [pytest.approx(step, rel=SAME_CURVE, abs=2e-6) for step in parts(whole)]


@pytest.mark.slow
def test_a_run_without_adapter_is_resumed_with_its_random_numbers(data, tmp_path):
    options = {"lora_rank": 0, "num_points": 64, "preview_steps": 0, "max_steps": 3}
    train.main(command(data, tmp_path / "whole", **options))
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-1").rename(tmp_path / "again" / "checkpoint-1")
    final = train.main([*command(data, tmp_path / "again", **options), "--resume"])
    ours, theirs = ([e["loss"] for e in curve(tmp_path / name, 3)] for name in ("again", "whole"))
    assert ours == pytest.approx(theirs, rel=SAME_CURVE)
    assert check_checkpoint(final).ok and check_checkpoint(final).layout == "released"
    merge.main([str(tmp_path / "again" / "checkpoint-3"), "--output", str(tmp_path / "merged")])
    made, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", final))
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)
    assert AutoModel.from_pretrained(tmp_path / "merged").load_processor().image_size == 56


def test_half_a_checkpoint_is_passed_over_and_a_whole_one_is_not_overwritten(whole, data, tmp_path):
    shutil.copytree(whole / "checkpoint-1", tmp_path / "checkpoint-1")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"epoch"')
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-20")
    for weights in (tmp_path / "checkpoint-20").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-30", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "checkpoint-best").mkdir()
    assert recipe.newest_checkpoint(tmp_path).name == "checkpoint-1"
    with pytest.raises(ValueError, match="--resume"):
        train.main(command(data, tmp_path))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("resume", [["--resume"], ["--resume_from_checkpoint", "True"]], ids=str)
def test_a_run_is_not_resumed_with_another_adapter(whole, data, tmp_path, rank, resume):
    shutil.copytree(whole / "checkpoint-1", tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=rf"--lora_rank \d+, not {rank}"):
        train.main([*command(data, tmp_path, lora_rank=rank), *resume])


def test_a_run_is_not_resumed_with_an_adapter_of_another_weight(whole, data, tmp_path):
    shutil.copytree(whole / "checkpoint-1", tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="--lora_alpha 8, not 512"):
        train.main([*command(data, tmp_path, lora_alpha=512), "--resume"])


def test_a_run_is_not_resumed_with_other_samples_or_other_parts(whole, data, tmp_path):
    shutil.copytree(whole / "checkpoint-1", tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"--train_modules \[.*\], not \['mlp1'\], --seed 42, not 9"):
        train.main([*command(data, tmp_path, seed=9, train_modules="mlp1"), "--resume"])


@pytest.mark.parametrize("named", ["True", "checkpoint-1", None])
def test_the_checkpoint_to_go_on_from_may_be_named_or_be_the_newest(whole, data, named):
    named = str(whole / named) if named == "checkpoint-1" else named
    arguments = ["--resume_from_checkpoint", named] if named else ["--resume"]
    own, training, _ = recipe.parse_arguments([*command(data, whole), *arguments])
    newest = str(whole / f"checkpoint-{STEPS}")
    assert recipe._find_start(training, own, {}) == (newest if named in ("True", None) else named)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs=0"),
        ({"label_smoothing_factor": 0.1}, "no mask would be learned"),
        ({"dtype": "bfloat16", "bf16": False}, "--dtype bfloat16 needs --bf16"),
        ({"dtype": "float16", "fp16": True, "bf16": False}, "--fp16 on a GPU"),
        ({"mask_loss_weight": -1}, "--mask_loss_weight -1.0"),
        ({"num_points": -1}, "--num_points -1 must be at least 0"),
        ({"train_sampling_strategy": "group_by_length"}, "order that the mixture draws"),
        ({"eval_strategy": "steps"}, "--eval_strategy steps needs --eval_split"),
    ],
)
def test_arguments_by_which_nothing_sensible_is_learned_are_refused(data, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        train.main(command(data, tmp_path, **options))


def test_losses_are_averaged_over_devices(data, tmp_path, monkeypatch):
    command_line = command(data, tmp_path, average_tokens_across_devices=False)
    recipe.parse_arguments(command_line)  # one device
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="weigh differently on several devices"):
        recipe.parse_arguments(command_line)


def test_the_best_checkpoint_on_held_out_data_is_what_comes_out(data, tmp_path):
    held_out = {"eval_split": "train", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    final = train.main(command(data, tmp_path, max_steps=2, learning_rate=5, preview_steps=0, **held_out))
    log = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    before, after = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert before < after  # at this rate the first step is bad and the second one worse
    merge.main([str(tmp_path / "checkpoint-1"), "--output", str(tmp_path / "merged")])
    best, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", final))
    assert all(torch.equal(best[name], found[name]) for name in best)


def test_targets_that_are_fused_in_one_tower_only_come_out(data, tmp_path):
    final = train.main(command(data, tmp_path, max_steps=1, lora_targets="attn.qkv", preview_steps=0))
    assert check_checkpoint(final).ok
    merge.main([str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    made, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", final))
    torch.testing.assert_close(made, wanted)


def test_held_out_splits_are_not_those_that_are_learned(data, tmp_path):
    shutil.copy(data / "train.jsonl", data / "val.jsonl")
    listed = [{"name": "jsonl", "root": str(data), "split": "train"}]
    listed += [listed[0] | {"split": "gone", "eval_split": "train"}]
    (tmp_path / "mixture.json").write_text(json.dumps({"datasets": listed}))
    datasets, _ = recipe.open_datasets([str(tmp_path / "mixture.json")], "val", held_out=True)
    assert [dataset.records.path.name for dataset in datasets.values()] == ["val.jsonl", "train.jsonl"]


# ---------- what comes out


def test_the_result_is_a_released_checkpoint(whole):
    report = check_checkpoint(whole / "final")
    assert report.ok and report.layout == "released"
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(TINY), whole / "final"))
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(".q_proj." in name for name in changed) and any("sam_mask_decoder" in name for name in changed)
    assert not any("image_encoder" in name or "vision_model" in name for name in changed)
    assert AutoModel.from_pretrained(whole / "final").load_processor().image_size == 56
    assert not list((whole / "final").glob("*.bin"))


def test_the_adapter_alone_makes_the_same_model(whole, tmp_path):
    merge.main([str(whole / f"checkpoint-{STEPS}"), "--output", str(tmp_path)])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, whole / "final"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"There is no folder .*nowhere"):
        merge.merge_adapter(tmp_path / "nowhere", tmp_path / "merged")


def test_an_adapter_that_lacks_a_weight_is_not_merged(whole, tmp_path):
    broken = shutil.copytree(whole / "adapter", tmp_path / "broken")
    weights = load_file(broken / merge.WEIGHTS)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, broken / merge.WEIGHTS)
    with pytest.raises(ValueError, match="of the adapter or of the model only"):
        merge.merge_adapter(broken, tmp_path / "merged", TINY)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_internlm2_is_fused_as_the_official_code_has_it(tmp_path):
    base = str(GOLDEN / "ivl_internlm2")
    torch.manual_seed(0)
    arguments = recipe.RecipeArguments(model=base, lora_rank=2, lora_alpha=6)
    wrapped = recipe.prepare_model(AutoModel.from_pretrained(base, dtype=torch.float32), arguments)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "native")
    merge.release_adapter(tmp_path / "native", output=tmp_path / "released")
    names = load_file(tmp_path / "released" / "adapter_model.safetensors")
    layer = "base_model.model.language_model.model.layers.0"
    assert names[f"{layer}.attention.wqkv.lora_A.weight"].shape[0] == 6  # ranks of three
    assert f"{layer}.feed_forward.w1.lora_B.weight" in names
    assert "base_model.model.language_model.output.weight" in names
    for kind in ("native", "released"):
        merge.merge_adapter(tmp_path / kind, tmp_path / f"{kind}_merged", base)
    ours, theirs = (load_file(tmp_path / f"{kind}_merged" / "model.safetensors") for kind in ("native", "released"))
    assert ours.keys() == theirs.keys() == load_file(f"{base}/model.safetensors").keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("module", ["vision_model", "self_attn"])
def test_fused_tensors_trained_in_full_are_those_of_the_official_code(tmp_path, module):
    base = str(GOLDEN / "ivl_internlm2")
    original = load_file(f"{base}/model.safetensors")
    arguments = recipe.RecipeArguments(model=base, lora_rank=2, lora_targets=["w1"], train_modules=[module])
    wrapped = recipe.prepare_model(AutoModel.from_pretrained(base, dtype=torch.float32), arguments)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5
    wrapped.save_pretrained(tmp_path / "native")
    merge.release_adapter(tmp_path / "native", output=tmp_path / "released")
    trained = load_file(tmp_path / "released" / "adapter_model.safetensors")
    ends = (".attn.qkv.weight", ".attn.qkv.bias") if module == "vision_model" else (".attention.wqkv.weight",)
    found = [name for name in trained if name.endswith(ends)]
    assert found
    for name in found:
        torch.testing.assert_close(trained[name], original[name.removeprefix("base_model.model.")].float() + 0.5)
    merge.merge_adapter(tmp_path / "released", tmp_path / "merged", base)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    loaded = AutoModel.from_pretrained(base, dtype=torch.float32)
    loaded.load_adapter(str(tmp_path / "released"))
    for name in found:
        name = name.removeprefix("base_model.model.")
        torch.testing.assert_close(merged[name], original[name] + 0.5)
    ours = {name.replace(".modules_to_save.default", ""): tensor for name, tensor in loaded.state_dict().items()}
    theirs = AutoModel.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    part = "vision_model" if module == "vision_model" else "self_attn.k_proj"
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if part in name and "inv_freq" not in name)


@pytest.mark.parametrize(
    "names", [["mask_decoder", "sam_mask_decoder.transformer"], ["text_hidden_fcs", "text_hidden_fcs.0"], [""]]
)
def test_modules_to_train_are_taken_once(names):
    model = AutoModel.from_pretrained(GOLDEN / "ivl_qwen2")
    assert recipe._full_modules(model, names) == recipe._full_modules(model, [name for name in names if name][:1])


# ---------- many GPUs, and one shot


@pytest.mark.parametrize("file", sorted((ROOT / "finetune" / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_reads_its_configs(file):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))  # refuses what it does not know
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[file.stem.split("_")[0]]
    assert config.distributed_type.value == kind
    assert config.num_machines == (2 if file.stem.endswith("_two_machines") else 1)
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert all(name in known for name in (*config.fsdp_config, *config.deepspeed_config))


def test_pictures_with_dutch_expressions_are_annotated_as_they_are_drawn(tmp_path):
    one_shot.write_new_pictures(tmp_path, seed=3, count=2)
    dataset = open_dataset("finetune", tmp_path, "train")
    for index in range(2):
        scene, sample = one_shot.new_scene(3, index), dataset[index]
        assert np.array_equal(np.array(sample.media.read()[0]), scene.frames[0])
        assert len(sample.turns) == len(scene.turns) == 4
        for turn, drawn in zip(sample.turns, scene.turns, strict=True):
            assert np.array_equal(turn.objects[0].read([0], one_shot.SIZE), drawn.masks[0])
            assert one_shot.in_dutch(scene.objects[drawn.targets[0]]) in turn.question
        first = scene.objects[scene.turns[0].targets[0]]
        for kind in ("color", "shape"):
            assert sum(getattr(thing, kind) == getattr(first, kind) for thing in scene.objects) == 2
    assert not np.array_equal(one_shot.new_scene(3, 0, "test").frames, one_shot.new_scene(3, 0).frames)
    assert "| b | 1.0 | 2.0 |" in one_shot.format_scores({"b": 1}, {"b": 2})


@pytest.mark.parametrize("main", [one_shot.main, train.main], ids=["one_shot", "scenes"])
def test_one_process_takes_one_gpu(tmp_path, monkeypatch, main):
    """Trainer would wrap the model into DataParallel; one_shot would find out only after it has measured."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="There are 2 GPUs, but one process"):
        main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_one_shot_takes_no_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Leave the launcher out"):
        one_shot.main(["--output_dir", str(tmp_path / "out")])
