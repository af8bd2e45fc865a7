use super::*;
use crate::adapter::Expert;

fn part(name: &str, shape: [u64; 2]) -> Part {
    let parameter = Some(format!("{name}.weight"));
    let (key, name) = (name.to_owned(), name.to_owned());
    Part { key, expert: None, name, parameter, is_of_one_expert: false, shape, is_by_tokens: None }
}

fn layout(names: &[(&str, [u64; 2])]) -> Layout {
    Layout {
        parts: names.iter().map(|(name, shape)| part(name, *shape)).collect(),
        base: None,
        is_flattened: false,
        transposes_experts: None,
        replication: None,
        unknown_order: None,
    }
}

#[test]
fn rows_in_an_order_that_nothing_tells_are_not_comparable_with_others() {
    let stored = || Layout { unknown_order: Some("llama.cpp's order".into()), ..model("model.") };
    let alignment = align(&[model("model."), stored(), stored()]);
    assert!(
        alignment.reason(0, 1).expect("apart").contains("the rows of the one are in llama.cpp's")
    );
    assert_eq!(alignment.reason(1, 2), None);
}

/// A model of two blocks under some prefix.
fn model(prefix: &str) -> Layout {
    let names = ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"];
    let names: Vec<_> = names.map(|name| format!("{prefix}{name}")).into();
    let shape = |name: &String| if name.ends_with('q') { [8, 8] } else { [16, 8] };
    let parts: Vec<_> = names.iter().map(|name| (name.as_str(), shape(name))).collect();
    layout(&parts)
}

fn align(layouts: &[Layout]) -> Alignment {
    Alignment::of(&layouts.iter().collect::<Vec<_>>(), &Task::new()).expect("aligned")
}

/// The names of a member's units in its family.
fn names(alignment: &Alignment, member: usize) -> Vec<String> {
    let units = alignment.members[member].units.iter();
    units.map(|unit| unit.identity.name.clone()).collect()
}

#[test]
fn prefixes_are_brought_together_known_or_not() {
    for prefixes in [
        ["model.", "", "model.language_model.", "language_model.model."],
        ["thinker.model.", "model.", "", "thinker.model."],
        ["bert.encoder.", "encoder.", "encoder.", "bert.encoder."],
        ["transformer.", "_orig_mod.transformer.", "", "base_model.transformer."],
    ] {
        let aligned = align(&prefixes.map(model));
        for member in 0..4 {
            assert_eq!(aligned.reason(0, member), None, "{prefixes:?}");
            assert_eq!(names(&aligned, member), names(&aligned, 0), "{prefixes:?}");
        }
        // In whatever order they come.
        let mut turned = prefixes;
        turned.reverse();
        let again = align(&turned.map(model));
        assert_eq!(names(&again, 0), names(&again, 3), "{prefixes:?}");
    }
}

#[test]
fn a_part_of_the_modules_is_enough() {
    let some = layout(&[("language_model.model.layers.1.up", [16, 8])]);
    let aligned = align(&[model("model."), some]);
    assert_eq!(aligned.reason(0, 1), None);
    assert_eq!(names(&aligned, 1), ["layers.1.up.weight"]);
    // A head has no prefix, whatever the others have.
    let parts = [("foo.layers.0.q", [8, 8]), ("lm_head", [32, 8])];
    let other = [("layers.0.q", [8, 8]), ("lm_head", [32, 8])];
    let aligned = align(&[layout(&parts), layout(&other)]);
    assert_eq!(names(&aligned, 0), names(&aligned, 1));
}

#[test]
fn more_than_one_way_is_none() {
    let two = layout(&[("encoder.layers.0.q", [8, 8]), ("decoder.layers.0.q", [8, 8])]);
    let one = layout(&[("layers.0.q", [8, 8])]);
    let aligned = align(&[two, one.clone()]);
    let reason = aligned.reason(0, 1).expect("not comparable");
    assert!(reason.contains("in several ways") && reason.contains("encoder."), "{reason}");
    // Shapes may tell.
    let two = layout(&[("encoder.layers.0.q", [8, 8]), ("decoder.layers.0.q", [8, 4])]);
    let aligned = align(&[two, one]);
    assert_eq!(aligned.reason(0, 1), None);
    assert_eq!(names(&aligned, 1), ["encoder.layers.0.q.weight"]);
}

#[test]
fn towers_of_one_shape_are_not_one() {
    for (one, other) in [
        ("text_model.encoder.", "vision_model.encoder."),
        ("language_model.model.", "vision_tower."),
        ("model.encoder.", "model.decoder."),
    ] {
        let aligned = align(&[model(one), model(other)]);
        assert!(aligned.reason(0, 1).is_some(), "{one} {other}");
        let whole = [model(one).parts, model(other).parts].concat();
        let whole = Layout { parts: whole, ..model("") };
        let aligned = align(&[whole, model(one), model(other)]);
        // Beside both, each is itself.
        assert!((0..3).all(|member| aligned.reason(0, member).is_none()));
        let shared = |x, y: usize| {
            let known = names(&aligned, x);
            names(&aligned, y).iter().filter(|name| known.contains(name)).count()
        };
        assert_eq!((shared(0, 1), shared(0, 2), shared(1, 2)), (4, 4, 0));
    }
}

#[test]
fn disjoint_modules_of_one_model_are_known_by_their_neighbors() {
    let based = |names: &[(&str, [u64; 2])], base: &str| Layout {
        base: Some(base.to_owned()),
        ..layout(names)
    };
    let q = ("model.layers.0.attn.q", [8, 8]);
    for (other, is_known) in [
        (("layers.0.attn.v", [8, 8]), true),
        (("layers.7.attn.q", [8, 8]), true),
        (("layers.0.attn.v", [4, 8]), true),
        (("layers.7.attn.q", [4, 8]), false),
        (("layers.0.mlp.up", [8, 8]), false),
        (("h.0.attention.query", [8, 8]), false),
    ] {
        let aligned = align(&[layout(&[q]), layout(&[other])]);
        assert_eq!(aligned.reason(0, 1).is_none(), is_known, "{other:?}");
        let aligned = align(&[based(&[q], "a"), based(&[other], "b")]);
        let reason = aligned.reason(0, 1).expect("other bases");
        assert!(reason.contains("different bases"), "{reason}");
        // Of one base no module of another shape is the same under another name.
        let aligned = align(&[based(&[q], "a"), based(&[other], "a")]);
        let is_sure = is_known || other.0.starts_with("layers") && other.1 != q.1;
        assert_eq!(aligned.reason(0, 1).is_none(), is_sure, "{other:?}");
    }
}

/// Experts of one block, stacked: the factors of gate_up_proj and of down_proj.
fn stacked(shapes: [[u64; 2]; 2], transposes: Option<bool>) -> Layout {
    let path = "model.layers.0.mlp.experts";
    let part = |(parameter, shape): (&str, [u64; 2]), index| Part {
        key: format!("{path}.{parameter}"),
        expert: Some(Expert { index, count: 2 }),
        name: format!("{path}.{parameter}[{index}]"),
        parameter: Some(format!("{path}.{parameter}")),
        is_of_one_expert: false,
        shape,
        is_by_tokens: None,
    };
    let of = |own| (0..2).map(move |index| part(own, index));
    let [first, second] = shapes;
    let parts = of(("gate_up_proj", first)).chain(of(("down_proj", second))).collect();
    Layout { parts, transposes_experts: transposes, ..layout(&[]) }
}

/// The same one by one.
fn single(width: u64, inner: u64) -> Layout {
    let path = "model.layers.0.block_sparse_moe.experts";
    let mut parts = Vec::new();
    for expert in 0..2 {
        for (name, shape) in
            [("w1", [inner, width]), ("w2", [width, inner]), ("w3", [inner, width])]
        {
            parts.push(part(&format!("{path}.{expert}.{name}"), shape));
        }
    }
    Layout { parts, ..layout(&[]) }
}

#[test]
fn stacked_experts_are_cut_into_single_ones() {
    for (shapes, transposes, is_transposed) in [
        ([[10, 6], [6, 5]], None, false),
        ([[6, 10], [5, 6]], None, true),
        ([[6, 10], [5, 6]], Some(true), true),
    ] {
        let aligned = align(&[stacked(shapes, transposes), single(6, 5)]);
        assert_eq!(aligned.reason(0, 1), None);
        let of = |member: usize| {
            let units = aligned.members[member].units.iter();
            let mut found: Vec<_> = units.map(|unit| (unit.identity.clone(), unit.shape)).collect();
            found.sort();
            found
        };
        assert_eq!(of(0), of(1));
        assert_eq!(of(0).len(), 6);
        let first = &aligned.members[0].units[1];
        assert_eq!((first.is_transposed, first.outputs.clone()), (is_transposed, Some(5..10)));
        let label = aligned.label(0, &first.identity);
        assert_eq!(label, "model.layers.0.block_sparse_moe.experts.0.w3");
    }
}

#[test]
fn square_experts_lie_as_their_release_laid_them() {
    // gate_up_proj is square where the width is twice the inner one, down_proj where it is the same.
    let shapes = [[8, 8], [8, 4]];
    let aligned = align(&[stacked(shapes, None), single(8, 4)]);
    assert!(aligned.reason(0, 1).expect("not told").contains("nothing tells how"));
    for (shapes, transposes) in [(shapes, false), ([[8, 8], [4, 8]], true)] {
        let aligned = align(&[stacked(shapes, Some(transposes)), single(8, 4)]);
        assert_eq!(aligned.reason(0, 1), None);
        assert!(aligned.members[0].units.iter().all(|unit| unit.is_transposed == transposes));
    }
    let aligned = align(&[stacked([[8, 8]; 2], Some(true)), stacked([[8, 8]; 2], Some(false))]);
    assert!(aligned.reason(0, 1).is_some());
}

#[test]
fn flattened_names_are_those_with_dots() {
    let flat = |names: &[(&str, [u64; 2])]| Layout { is_flattened: true, ..layout(names) };
    let dotted = layout(&[("unet.down_blocks.0.to_q", [8, 8]), ("unet.mid_block.to_q", [4, 8])]);
    let own = flat(&[
        ("lora_unet_down_blocks_0_to_q", [8, 8]),
        ("lora_unet_mid_block_to_q", [4, 8]),
        ("lora_te_text_model_q", [8, 8]),
    ]);
    let other = flat(&[("lycoris_mid_block_to_q", [4, 8])]);
    let aligned = align(&[own.clone(), dotted, other.clone()]);
    assert!(aligned.reason(0, 1).is_none() && aligned.reason(1, 2).is_none());
    assert_eq!(names(&aligned, 0)[..2], names(&aligned, 1)[..]);
    assert_eq!(names(&aligned, 2)[0], names(&aligned, 0)[1]);
    // And with each other.
    let aligned = align(&[own, other]);
    assert_eq!(names(&aligned, 1)[0], names(&aligned, 0)[1]);
    // Two names of the same letters may be either.
    let dotted = layout(&[("a.b_c.d", [8, 8]), ("a_b.c.d", [8, 8])]);
    assert!(align(&[dotted, flat(&[("lora_unet_a_b_c_d", [8, 8])])]).reason(0, 1).is_some());
}

#[test]
fn names_that_rules_would_make_one_stay_as_they_are() {
    let both = layout(&[("model.layers.0.q", [8, 8]), ("language_model.layers.0.q", [8, 8])]);
    let aligned = align(&[both.clone(), both]);
    assert_eq!(names(&aligned, 0).len(), 2);
    assert_ne!(names(&aligned, 0)[0], names(&aligned, 0)[1]);
}
