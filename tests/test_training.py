"""Losses of `forward`, and the training script: it learns, and goes on after a stop as if there had been none."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, Trainer, TrainingArguments

from sa2va import Sa2VAChatModel
from sa2va.data.scenes import make_sample
from sa2va.data.shapes import SceneObject
from sa2va.finetune import batches, blend, trainee
from sa2va.finetune import scenes as train
from sa2va.finetune.batches import CURRICULUM, SceneCollator, ScheduledScenes, Stage
from sa2va.finetune.tiny import build_model
from sa2va.modeling_sa2va import _uncertain_points
from sa2va.sam2_decoder import MaskPrediction


@pytest.fixture(scope="module")
def tiny():
    """An untrained small model and its processor."""
    return build_model(0)


def arguments_of(batch: dict) -> dict:
    """A batch without what only training heads read."""
    return {k: v for k, v in batch.items() if k not in ("seg_classes", "seg_boxes", "cell_classes")}


def batch_of(processor, *tasks: str, num_frames: int = 7) -> dict:
    """A batch of one scene of each task."""
    scenes = [make_sample(0, i, task=task, num_frames=num_frames) for i, task in enumerate(tasks)]
    return SceneCollator(processor)(scenes)


def test_a_batch_may_mix_pictures_clips_and_samples_without_masks(tiny):
    model, processor = tiny
    batch = batch_of(processor, "refer", "video_multi", "absent", "caption", "region", "followup")
    output = model(**arguments_of(batch))
    assert torch.isfinite(output.loss)
    for predicted, wanted in zip(output.pred_masks, batch["mask_labels"], strict=True):
        assert len(predicted) == len(wanted)
    assert output.pred_masks[1].shape[1] == 7
    for name in ("lm_loss", "mask_loss", "dice_loss", "iou_loss", "object_score_loss"):
        assert output[name].ndim == 0


def test_loss_is_the_weighted_sum_of_its_parts(tiny):
    model, processor = tiny
    config = model.config
    output = model(**arguments_of(batch_of(processor, "refer", "multi")))
    expected = (
        output.lm_loss
        + config.mask_loss_weight * output.mask_loss
        + config.dice_loss_weight * output.dice_loss
        + config.iou_loss_weight * output.iou_loss
        + config.object_score_loss_weight * output.object_score_loss
    )
    torch.testing.assert_close(output.loss, expected)


def test_a_batch_gives_the_masks_its_samples_give_alone(tiny):
    model, processor = tiny
    model.eval()
    together = model(**arguments_of(batch_of(processor, "refer", "multi"))).pred_masks[0]
    alone = model(**arguments_of(batch_of(processor, "refer"))).pred_masks[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_tracked_frames_teach_the_memory_modules():
    model, processor = build_model(0)
    sam2 = model.grounding_encoder.sam2_model
    torch.nn.init.constant_(sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 10.0)  # else no pointers pass
    model(**arguments_of(batch_of(processor, "video_refer"))).loss.backward()
    for module in (sam2.memory_attention, sam2.memory_encoder, sam2.obj_ptr_proj):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("named", [True, False])
def test_a_plain_trainer_is_told_that_labels_may_come_alone(tiny, tmp_path, named):
    """Left to itself it wants all of "labels" and "mask_labels", and evaluates no loss where one is missing."""
    model, processor = tiny
    scenes = [make_sample(0, index, task="absent") for index in range(2)]
    settings = TrainingArguments(str(tmp_path), label_names=["labels"] if named else None, use_cpu=True)

    def collate(batch):
        return {k: v for k, v in arguments_of(SceneCollator(processor)(batch)).items() if k != "mask_labels"}

    metrics = Trainer(model, settings, data_collator=collate, eval_dataset=scenes).evaluate()
    assert ("eval_loss" in metrics) == named


def test_a_plain_trainer_computes_metrics_of_batches_with_and_without_masks(tiny, tmp_path):
    """Of the outputs those are gathered that every batch has."""
    model, processor = tiny
    scenes = [make_sample(0, index, task=task) for index, task in enumerate(("refer", "absent"))]
    settings = TrainingArguments(
        str(tmp_path), label_names=["labels"], use_cpu=True, per_device_eval_batch_size=1, remove_unused_columns=False
    )

    def collate(batch):
        given = arguments_of(SceneCollator(processor)(batch))
        has_masks = given["mask_labels"][0].numel()
        return {k: v for k, v in given.items() if has_masks or k not in ("grounding_pixel_values", "mask_labels")}

    seen = []
    trainer = Trainer(model, settings, collate, compute_metrics=lambda found: seen.append(found.predictions) or {})
    trainer.evaluate(scenes)
    (logits,) = seen
    assert logits.shape[0] == 2 and logits.shape[2] == model.config.get_text_config().vocab_size


@pytest.mark.parametrize("batches", [1, 2])
def test_mask_losses_weigh_the_same_however_many_batches_make_a_step(tiny, batches):
    """`Trainer` adds up the losses of a step's batches, each over the supervised tokens of all of them."""
    model, processor = tiny
    model.eval()
    batch = arguments_of(batch_of(processor, "refer"))
    whole = model(**batch)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    parts = [model(**batch, num_items_in_batch=batches * tokens) for _ in range(batches)]
    for name in ("loss", "lm_loss", "mask_loss", "dice_loss", "iou_loss", "object_score_loss"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])


def test_frozen_parts_and_gradient_checkpointing_work():
    model, processor = build_model(0)
    model.vision_model.requires_grad_(False)
    model.grounding_encoder.sam2_model.image_encoder.requires_grad_(False)
    model.train()
    arguments = arguments_of(batch_of(processor, "refer", "absent"))
    calls, layer = [], model.get_decoder().layers[0]
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))

    def learn():
        calls.clear()
        model.zero_grad()
        loss = model(**arguments).loss
        loss.backward()
        return loss, layer.self_attn.q_proj.weight.grad, len(calls)

    loss, gradient, once = learn()
    model.gradient_checkpointing_enable()
    again, same, twice = learn()
    torch.testing.assert_close((again, same), (loss, gradient))
    assert (once, twice) == (1, 2)
    assert model.vision_model.embeddings.cls_token.grad is None
    assert model.text_hidden_fcs[0].weight.grad is not None


def test_point_sampling_estimates_the_full_loss(tiny):
    model, processor = tiny
    arguments = arguments_of(batch_of(processor, "multi"))
    full = model(**arguments)
    settings = {"num_points": 4096, "importance_sample_ratio": 0.0}
    before = {name: getattr(model.config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(model.config, name, value)
        torch.manual_seed(0)
        sampled = model(**arguments)
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
    torch.testing.assert_close(sampled.mask_loss, full.mask_loss, rtol=0.05, atol=0.01)
    torch.testing.assert_close(sampled.dice_loss, full.dice_loss, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("shape", [(2, 1, 20, 20), (1, 2, 20, 20), (20, 20)])
def test_masks_that_do_not_fit_the_answer_are_refused(tiny, shape):
    model, processor = tiny
    arguments = arguments_of(batch_of(processor, "refer"))
    with pytest.raises(ValueError, match="mask_labels"):
        model(**arguments | {"mask_labels": [torch.zeros(shape)]})


def test_a_seg_without_a_label_is_no_object(tiny):
    """Such as one of an earlier turn, or of the question."""
    model, processor = tiny
    batch = batch_of(processor, "multi")
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "labels")}
    found = (text["input_ids"] == processor.tokenizer.convert_tokens_to_ids("[SEG]")).nonzero()
    text["labels"][tuple(found[0])] = -100
    assert len(model(**text).seg_hidden_states) == len(found) - 1 > 0


def test_placeholders_that_do_not_fit_the_picture_are_refused(tiny):
    model, processor = tiny
    arguments = arguments_of(batch_of(processor, "refer"))
    with pytest.raises(ValueError, match="image placeholders"):
        model(**arguments | {"pixel_values": arguments["pixel_values"].repeat(2, 1, 1, 1)})


def test_forward_gives_a_tuple_where_that_is_asked_for(tiny):
    model, processor = tiny
    arguments = arguments_of(batch_of(processor, "refer"))
    assert isinstance(model(**arguments, return_dict=False), tuple)


def test_labels_cover_exactly_the_answers(tiny):
    _, processor = tiny
    scene = make_sample(0, 1, task="followup")
    batch = SceneCollator(processor)([scene])
    kept = batch["input_ids"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(kept) == "".join(f"{turn.answer}<|im_end|>" for turn in scene.turns)


def test_training_prompts_are_those_of_prediction(tiny):
    from PIL import Image

    _, processor = tiny
    scene = make_sample(0, 2, task="refer")
    asked = processor.prepare(image=Image.fromarray(scene.frames[0]), text=scene.turns[0].question).input_ids[0]
    trained = SceneCollator(processor)([scene])["input_ids"][0]
    assert torch.equal(trained[: len(asked)], asked)


def test_the_schedule_is_the_same_for_the_same_seed_and_follows_its_stages():
    stages = (Stage(0.5, {"absent": 1.0}), Stage(1.0, {"caption": 1.0}, video_share=1.0))
    first, second = (ScheduledScenes(3, 4, 4, 2, 6, stages) for _ in range(2))
    assert (first[5].frames == second[5].frames).all()
    assert [first[i].task for i in range(8)] == ["absent"] * 8
    assert first[8].task.startswith("video") and first[10] is None
    assert CURRICULUM[-1].until == 1.0


def test_the_learning_rate_warms_up_again_where_words_begin(tmp_path):
    model, _ = build_model(0)
    _, arguments = train.parse_arguments(
        ["--preset", "smoke", "--output_dir", str(tmp_path), "--max_steps", "100", "--warmup_steps", "10"]
    )
    dataset = ScheduledScenes(0, 100, 4, 2, 6, (Stage(0.3, {}), Stage(1.0, {"refer": 1.0})))
    trainee_ = trainee.SceneTrainee(model)
    trainer = train.SceneTrainer(model=trainee_, args=arguments, train_dataset=dataset, settings={})
    assert not trainer.model_accepts_loss_kwargs  # so that it divides the losses of a step's batches by their number
    trainer.create_optimizer_and_scheduler(100)
    rate, *_ = trainer.lr_scheduler.lr_lambdas
    assert rate(29) > 0.5 and rate(30) < 0.1 and rate(40) > 0.5 and rate(99) < 0.01


def smoke(folder, *more):
    """Arguments of the shortest run."""
    common = ["--preset", "smoke", "--save_steps", "2", "--logging_steps", "1", "--disable_tqdm", "true"]
    return [*common, "--dataloader_num_workers", "0", "--output_dir", str(folder), *more]


@pytest.mark.slow
def test_training_stopped_and_resumed_reaches_the_same_loss(tmp_path):

    def losses(folder):
        state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    final = train.main(smoke(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    (stopped).mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(stopped / "checkpoint-2")  # what a kill after step 2 leaves
    train.main(smoke(stopped, "--resume_from_checkpoint", "True"))
    assert losses(stopped)[2:] == pytest.approx(losses(tmp_path / "whole")[2:], rel=1e-4)
    assert (final / "curve.png").stat().st_size > 10_000
    assert AutoModel.from_pretrained(final).load_processor().image_size == 56


def small(folder, *more):
    """Arguments of a run of one step."""
    return smoke(folder, "--max_steps", "1", "--per_device_train_batch_size", "1", *more)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with such a run, which ended."""
    folder = tmp_path_factory.mktemp("begun")
    train.main(small(folder))
    return folder


@pytest.fixture
def finished(begun, tmp_path, monkeypatch):
    """A copy of `begun`, in which nothing may be trained any more."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(train, "make_trainer", None)
    return tmp_path


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (["--seed", "5"], "holds a run with seed 0 and not 5"),
        (["--init", train.TINY], "init None and not .*sa2va-tiny"),
        (["--learning_rate", "0.01"], "learning_rate 0.0012 and not 0.01"),
        (["--seed", "5", "--resume_from_checkpoint", "True"], "Name a new folder"),
    ],
)
def test_a_folder_takes_no_other_run(finished, other, told):
    with pytest.raises(ValueError, match=told):
        train.main(small(finished, *other))


def test_a_run_whose_settings_are_not_known_is_not_gone_on_with_unasked(finished):
    (finished / "checkpoint-1" / train.RECORD).unlink()
    with pytest.raises(ValueError, match=r"training.json is missing.*--resume_from_checkpoint \S+checkpoint-1"):
        train.main(small(finished))
    _, arguments = train.parse_arguments(small(finished, "--resume_from_checkpoint", str(finished / "checkpoint-1")))
    assert train.find_start(arguments, {}) == finished / "checkpoint-1"


def test_a_run_that_went_on_under_other_settings_is_not_taken_for_the_first(finished):
    """Of two runs in a folder, what the newest checkpoint was learned by counts."""
    record = finished / "checkpoint-1" / train.RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"learning_rate": 0.5}))
    with pytest.raises(ValueError, match=r"learning_rate 0.5 and not 0.0012"):
        train.main(small(finished))


@pytest.mark.parametrize("more", [[], ["--resume_from_checkpoint", "True"], ["--logging_steps", "7"]])
def test_nothing_is_written_where_nothing_is_left_to_do(finished, capsys, more):
    def written():
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

    before = written()
    assert train.main(small(finished, *more)) == finished / "final"
    assert "nothing is left to do" in capsys.readouterr().out
    assert written() == before
    assert json.loads((finished / "final" / train.RECORD).read_text()) == {"preset": "smoke", "seed": 0, "steps": 1}


def test_a_run_killed_before_its_result_was_written_goes_on(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    (tmp_path / "final" / train.RECORD).unlink()
    train.main(small(tmp_path))
    assert (tmp_path / "final" / train.RECORD).is_file()


def test_the_newest_checkpoint_is_asked_for_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"--resume_from_checkpoint True: .* holds no whole checkpoint"):
        train.main(small(tmp_path, "--resume_from_checkpoint", "True"))


def test_ten_minutes_learn_to_draw_what_the_small_checkpoint_means():
    options, arguments = train.parse_arguments(["--output_dir", "anywhere"])
    assert (options.init, options.new, options.learn) == (train.TINY, "mask_decoder", "mask_decoder")
    assert (arguments.max_steps, arguments.learning_rate) == (300, 3e-3)
    options, arguments = train.parse_arguments(["--learn", "all", "--max_steps", "7", "--output_dir", "anywhere"])
    assert (options.learn, arguments.max_steps) == ("all", 7)


@pytest.mark.parametrize(
    ("learners", "learn"), [("all", 5), ("sam2", 2), ("mask_decoder", 2), ("words", 4), ("tracking", 1)]
)
def test_only_what_is_named_learns(tiny, learners, learn):
    model, _ = tiny
    names = [name for name, _ in model.named_parameters() if train.LEARNERS[learners].match(name)]
    assert len({name.split(".")[0] for name in names}) == learn
    image_encoder = [name for name in names if ".image_encoder." in name]
    assert bool(image_encoder) == (learners in ("all", "sam2"))


def test_a_new_mask_decoder_leaves_the_words_as_they_were(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = train.start(str(tmp_path), seed=5, new="mask_decoder")
    same = {name: torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()}
    assert all(same[name] for name in same if name.startswith(("vision_model", "mlp1", "language_model")))
    assert all(same[name] for name in same if ".image_encoder." in name)
    assert not same["text_hidden_fcs.0.weight"]
    assert not same["grounding_encoder.sam2_model.sam_mask_decoder.mask_tokens.weight"]


def test_heads_are_kept_between_sittings(tiny, tmp_path):
    model, _ = tiny
    first, second = trainee.SceneTrainee(model), trainee.SceneTrainee(model)
    assert not torch.equal(first.box_head.weight, second.box_head.weight)
    trainee.save_heads(first, tmp_path / train.HEADS)
    trainee.load_heads(second, tmp_path / train.HEADS)
    assert torch.equal(first.box_head.weight, second.box_head.weight)


def test_two_sittings_become_one_by_parts_or_as_their_mean(tmp_path):
    sittings = []
    for seed in (0, 1):
        model, processor = build_model(seed)
        folder = tmp_path / str(seed)
        model.save_pretrained(folder / "final")
        processor.save_pretrained(folder / "final")
        trainee.save_heads(learner := trainee.SceneTrainee(model), folder / train.HEADS)
        sittings.append({name.removeprefix("model."): tensor for name, tensor in learner.state_dict().items()})
    first, second = sittings
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]

    def blended(name, *options):
        final = blend.main([*folders, "--output", str(tmp_path / name), *options])
        return {**Sa2VAChatModel.from_pretrained(final).state_dict(), **load_file(tmp_path / name / train.HEADS)}

    mean, joined = blended("mean"), blended("joined", "--take", "grounding_encoder|memory_head")
    for name, tensor in first.items():
        torch.testing.assert_close(mean[name], (tensor + second[name]) / 2)
        taken = second if name.startswith(("grounding_encoder", "memory_head")) else first
        assert torch.equal(joined[name], taken[name])


def test_checkpoints_of_different_models_are_not_blended():
    with pytest.raises(ValueError, match="other weights: b"):
        blend.blend({"a": torch.ones(1), "b": torch.ones(2)}, {"a": torch.ones(1), "b": torch.ones(3)}, None)


def test_prompts_are_drawn_to_the_encoded_centre_of_their_object(tiny):
    model, _ = tiny
    learner, boxes = trainee.SceneTrainee(model), torch.tensor([[0.25, 0.5, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]])
    layer = model.grounding_encoder.sam2_model.sam_prompt_encoder.pe_layer
    centre = layer((128, 128))[:, 63:65, 31:33].mean(dim=(1, 2))  # the four pixels around that point
    away = torch.ones_like(centre)  # the second object is nowhere, so its prompt may be anything
    classes = torch.tensor([[0, 1], [2, 3]])
    assert learner._point_loss(torch.stack([centre, away]), boxes, classes) < 1e-3
    assert learner._point_loss(torch.stack([away, centre]), boxes, classes) > 0.1


def test_a_clips_prompt_names_the_middle_of_its_key_frames(tiny):
    _, processor = tiny
    masks = torch.zeros(1, 7, 10, 10, dtype=torch.bool)
    masks[0, 0, 2:4, 0:2] = True
    masks[0, 1, 2:4, 4:6] = True  # hidden in the other key frames
    masks[0, 6, 8:10, 8:10] = True  # tracked, so no prompt reaches it
    box = SceneCollator(processor)._mean_boxes(masks)[0]
    torch.testing.assert_close(box, torch.tensor([0.3, 0.3, 0.2, 0.2]))


def test_places_are_compared_with_the_masks_of_the_last_frames():
    masks = torch.zeros(1, 3, 8, 8, dtype=torch.bool)
    for frame in range(3):
        masks[0, frame, :4, 2 * frame : 2 * frame + 2] = True  # of the 4 x 4 places two show it, elsewhere each time
    head = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(head.weight, 20.0)
    torch.nn.init.constant_(head.bias, -10.0)
    places = [masks[:, frame, ::2, ::2].flatten(1)[..., None].float() for frame in range(3)]
    assert trainee._shown_loss(head, places[1:], [masks]) < 1e-3
    assert trainee._shown_loss(head, places[:2], [masks]) > 1


@pytest.mark.parametrize(("num_frames", "guided"), [(5, False), (7, True)])
def test_what_memory_attention_says_of_tracked_frames_teaches_the_memory(tiny, num_frames, guided):
    model, processor = tiny
    batch = SceneCollator(processor)([make_sample(0, 3, task="video_refer", num_frames=num_frames)])
    losses = trainee.SceneTrainee(model)(**batch)
    assert ("memory_loss" in losses) == guided
    if guided:
        sam2_model = model.grounding_encoder.sam2_model
        learners = [*sam2_model.memory_encoder.parameters(), *sam2_model.memory_attention.layers[0].parameters()]
        gradients = torch.autograd.grad(losses["memory_loss"], learners)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_words_are_learned_without_what_sam2_would_see(tiny):
    model, processor = tiny
    batch = SceneCollator(processor, masks=False)([make_sample(0, 3, task="interview")])
    assert "grounding_pixel_values" not in batch
    losses = trainee.SceneTrainee(model)(**batch)
    assert "mask_loss" not in losses and {"lm_loss", "box_loss", "naming_loss", "standing_loss"} <= set(losses)


def thing(**traits) -> SceneObject:
    usual = {"color": "red", "shape": "star", "radius": 0.1, "x": 0.5, "y": 0.5, "angle": 0.0}
    return SceneObject(**usual | {"rgb": (0, 0, 0), "outlined": False} | traits)


def test_standings_say_how_an_object_stands_among_its_kind():
    objects = [thing(radius=0.2, x=0.1), thing(x=0.9), thing(shape="cross", radius=0.19, y=0.1)]
    (same_color, same_shape, everything) = batches._standings(0, objects, is_clip=False)
    unclear = batches.IGNORE_INDEX
    # how many others, largest, smallest, leftmost, rightmost, topmost, bottommost
    assert same_shape == [1, 1, 0, 1, 0, unclear, unclear]
    assert everything == [2, unclear, 0, 1, 0, 0, unclear]
    assert same_color == everything


def test_ranks_say_in_which_order_a_list_names_what_is_alike():
    objects = [thing(x=0.5), thing(x=0.1), thing(shape="cross", x=0.9), thing(color="blue", x=0.53)]
    unclear = batches.IGNORE_INDEX
    # among its colour, its shape, all: how many lie left of it
    assert batches._ranks(0, objects) == [1, unclear, unclear]
    assert batches._ranks(1, objects) == [0, 0, 0]
    assert batches._ranks(2, objects) == [2, 0, 3]


def test_only_pictures_teach_in_which_order_objects_stand(tiny):
    _, processor = tiny
    picture, clip = (SceneCollator(processor)([make_sample(0, 1, task=task)]) for task in ("multi", "video_multi"))
    assert (picture["cell_ranks"] != batches.IGNORE_INDEX).any()
    assert (clip["cell_ranks"] == batches.IGNORE_INDEX).all()


def test_sight_is_learned_without_words(tiny):
    model, processor = tiny
    batch = SceneCollator(processor, words=False)([make_sample(0, i, task="interview") for i in range(2)])
    assert "input_ids" not in batch and len(batch["pixel_values"]) == 2
    losses = trainee.SceneTrainee(model)(**batch)
    assert set(losses) == {"loss", "cell_loss", "cell_box_loss", "early_loss", "standing_loss", "rank_loss"}
    assert losses["rank_loss"] > 0 and losses["standing_loss"] > 0


def test_colour_and_shape_are_told_amid_the_vision_tower(tiny):
    model, processor = tiny
    batch = SceneCollator(processor, words=False)([make_sample(0, 1, task="interview")])
    loss = trainee.SceneTrainee(model)(**batch)["early_loss"]
    first, second, third, last = (layer.mlp.fc1.weight for layer in model.vision_model.encoder.layer)
    gradients = torch.autograd.grad(loss, [first, second, third, last], allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, True, False, False]


def test_the_past_of_an_object_is_its_mean_place_in_earlier_frames():
    boxes = torch.zeros(3, 1, 4)
    boxes[0, 0] = torch.tensor([0.2, 0.4, 0.1, 0.1])  # in the second frame it is hidden
    boxes[2, 0] = torch.tensor([0.8, 0.4, 0.1, 0.1])
    pasts = batches._pasts(boxes)[:, 0]
    assert pasts[0].isnan().all()
    torch.testing.assert_close(pasts[1:], torch.tensor([[0.2, 0.4], [0.2, 0.4]]))


def moving_sample():
    """A clip with a question about the direction in which something moves."""
    samples = (make_sample(0, index, task="video_question") for index in range(100))
    return next(s for s in samples if s.turns[0].kind == "direction" and s.turns[0].expected != "still")


def test_a_motion_is_looked_for_where_its_object_is_behind_the_first_frame(tiny):
    _, processor = tiny
    sample = moving_sample()
    (turn,) = sample.turns
    batch = SceneCollator(processor, masks=False)([sample])
    decode, is_told = processor.tokenizer.decode, batch["is_told"]
    assert decode(batch["input_ids"][is_told]) == " is moving"
    assert decode(batch["labels"].roll(-1, 1)[is_told]) == f" moving {turn.expected}"
    (number,) = [i for i, thing in enumerate(sample.objects) if thing.name in turn.question]
    cells, shown = batch["told_cells"].unflatten(1, (5, -1)), batch["cell_objects"] == number
    assert not cells[:, 0].any()
    assert shown[1:].any() and (cells[:, 1:][:, shown[1:]] > 0.25).all()


def test_a_motion_that_is_told_teaches_words_and_where_to_look(tiny):
    model, processor = tiny
    batch = SceneCollator(processor, masks=False)([moving_sample()])
    losses = trainee.SceneTrainee(model)(**batch)
    assert losses["told_loss"] > 0 and losses["telling_loss"] > 0
    out_of_sight = {**batch, "told_cells": torch.zeros_like(batch["told_cells"])}
    assert trainee.SceneTrainee(model)(**out_of_sight)["telling_loss"] == 0


def test_attention_loss_is_zero_where_all_attention_is_wanted(tiny):
    model, processor = tiny
    batch = arguments_of(batch_of(processor, "refer"))
    with trainee._attention_inputs(model) as (_, (layer, inputs)):
        model(**batch)
    row, column = torch.tensor([0]), torch.tensor([40])
    wanted = torch.zeros(1, batch["input_ids"].shape[1])
    wanted[0, :41] = 1
    assert trainee._attention_loss(layer, inputs, row, column, wanted) < 1e-5
    wanted[0, :41] = torch.arange(41) < 20
    assert trainee._attention_loss(layer, inputs, row, column, wanted) > 0.1


def test_tracking_looks_at_the_same_object_in_earlier_frames_only(tiny):
    model, processor = tiny
    batch = SceneCollator(processor)([make_sample(0, 1, task="video_refer", num_frames=6)])
    with trainee._attention_inputs(model) as (first, _):
        model(**arguments_of(batch))
    is_image = batch["input_ids"] == model.special_token_ids().image
    loss = trainee._tracking_loss(*first, is_image, batch["cell_objects"])
    nothing_earlier = batch["cell_objects"].clone()
    nothing_earlier[:-1] = -1
    nothing_earlier[0, 0] = nothing_earlier[-1].max()
    assert loss > 0
    assert trainee._tracking_loss(*first, is_image, nothing_earlier) > loss  # one token of 64 where there were several


# ---------- losses of masks


@pytest.mark.parametrize("all_masks", [False, True])
def test_mask_losses_are_those_computed_by_hand(all_masks):
    model, _ = build_model(0)
    model.config.num_points, model.config.supervise_all_masks = 0, all_masks
    wanted = torch.zeros(1, 2, 16, 16)
    wanted[0, 0, :8] = 1
    wanted[0, 1, :, :4] = 1
    predictions = []
    for t in range(2):  # one candidate of three is wrong everywhere, the third expects too little of itself
        right = torch.where(wanted[:, t : t + 1] > 0, 20.0, -20.0)
        candidates, expected = torch.cat([right, -right, right], dim=1), torch.tensor([[1.0, 1.0, 0.5]])
        one = torch.ones(1), torch.zeros(1), torch.zeros(1, 8)
        predictions.append(MaskPrediction(right, *one, candidates, expected))
    found = {name: float(value) for name, value in model._mask_losses(predictions, [wanted]).items()}
    wrong = 1 / 3 if all_masks else 0.0
    assert found["count"] == 2
    assert found["mask_loss"] == pytest.approx(40 * wrong, abs=1e-3)
    assert found["dice_loss"] == pytest.approx(2 * (1 - 1 / 257) * wrong, abs=1e-3)
    assert found["object_score_loss"] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert found["iou_loss"] == pytest.approx(2 * 1.25 / 3, abs=1e-4)


def test_a_mask_that_is_empty_and_found_empty_agrees():
    model, _ = build_model(0)
    model.config.num_points = 0
    nothing = torch.full((1, 1, 16, 16), -20.0)
    prediction = MaskPrediction(
        nothing, torch.ones(1), -20 * torch.ones(1), torch.zeros(1, 8), nothing.repeat(1, 3, 1, 1), torch.ones(1, 3)
    )
    found = model._mask_losses([prediction], [torch.zeros(1, 1, 16, 16)])
    assert all(found[name] < 1e-3 for name in ("mask_loss", "dice_loss", "object_score_loss", "iou_loss"))


@pytest.mark.parametrize(("cover", "loss"), [(0.4, 0.0), (0.6, 20.0)])
def test_an_object_counts_as_seen_where_it_covers_more_than_half_of_a_pixel(tiny, cover, loss):
    model, _ = tiny
    masks = torch.full((1, 3, 16, 16), -20.0)
    prediction = MaskPrediction(
        masks[:, :1], torch.ones(1), -20 * torch.ones(1), torch.zeros(1, 8), masks, torch.ones(1, 3)
    )
    found = model._mask_losses([prediction], [torch.full((1, 1, 16, 16), cover)])
    assert found["object_score_loss"].item() == pytest.approx(loss, abs=1e-3)


def test_points_lie_where_a_mask_is_uncertain():
    model, _ = build_model(0)
    model.config.num_points, model.config.importance_sample_ratio, model.config.oversample_ratio = 64, 0.5, 16
    logits = torch.full((1, 1, 16, 16), 9.0)
    logits[..., 4:8, :] = 0
    points = _uncertain_points(logits, model.config)
    assert points.shape == (1, 64, 2)
    assert ((points[0, :32, 1] > 0.25) & (points[0, :32, 1] < 0.5)).all()
