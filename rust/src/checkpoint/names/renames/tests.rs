use super::*;

fn built_in(model_type: &str) -> Renames {
    Renames::new(&families::rules(model_type).expect("a known type")).expect("sound")
}

fn whole(renames: &Renames, name: &str) -> String {
    let canonical = renames.canonical(name);
    assert_eq!((canonical.slice, canonical.obstacle), (None, None), "{name}");
    canonical.name
}

fn slice(renames: &Renames, name: &str) -> (String, Option<u64>, usize, usize) {
    let canonical = renames.canonical(name);
    assert_eq!(canonical.obstacle, None);
    let slice = canonical.slice.expect("a piece");
    (canonical.name, slice.expert, slice.slot, slice.slots)
}

#[test]
fn experts_one_by_one_are_pieces_of_the_stacked_ones() {
    let mixtral = built_in("mixtral");
    let stacked = "model.layers.0.mlp.experts.gate_up_proj";
    let old = "model.layers.0.block_sparse_moe.experts.12";
    assert_eq!(slice(&mixtral, &format!("{old}.w1.weight")), (stacked.into(), Some(12), 0, 2));
    assert_eq!(slice(&mixtral, &format!("{old}.w3.weight")), (stacked.into(), Some(12), 1, 2));
    let down = "model.layers.0.mlp.experts.down_proj";
    assert_eq!(slice(&mixtral, &format!("{old}.w2.weight")), (down.into(), Some(12), 0, 1));
    assert_eq!(whole(&mixtral, stacked), stacked);
    assert_eq!(
        whole(&mixtral, "layers.1.block_sparse_moe.gate.weight"),
        "layers.1.mlp.gate.weight"
    );
    // Of shared experts there is one, and the rest of a name must be what the rule says.
    let shared = "model.layers.0.mlp.shared_expert.gate_proj.weight";
    assert_eq!(whole(&built_in("qwen2_moe"), shared), shared);
    let scale = "model.layers.0.mlp.experts.3.down_proj.weight_scale_inv";
    assert_eq!(whole(&built_in("deepseek_v3"), scale), scale);
}

#[test]
fn every_spelling_of_a_module_comes_to_one() {
    let mut rules = families::rules("llava").expect("known");
    rules.extend(families::rules("clip_vision_model").expect("known"));
    let llava = Renames::new(&rules).expect("sound");
    for (name, spellings) in [
        (
            "model.language_model.layers.0.q.weight",
            [
                "language_model.model.layers.0.q.weight",
                "model.language_model.model.layers.0.q.weight",
            ],
        ),
        (
            "model.vision_tower.encoder.layers.0.fc1.weight",
            [
                "vision_tower.vision_model.encoder.layers.0.fc1.weight",
                "model.vision_tower.vision_model.encoder.layers.0.fc1.weight",
            ],
        ),
        ("lm_head.weight", ["language_model.lm_head.weight", "lm_head.weight"]),
    ] {
        assert_eq!(whole(&llava, name), name);
        for spelling in spellings {
            assert_eq!(whole(&llava, spelling), name);
        }
    }
}

#[test]
fn canonical_names_stay_what_they_are() {
    let names = [
        "model.layers.3.block_sparse_moe.experts.1.w2.weight",
        "model.layers.3.mlp.experts.1.up_proj.weight",
        "model.layers.3.feed_forward.experts.1.up_proj.weight",
        "backbone.layers.3.mixer.experts.1.up_proj.weight",
        "model.layers.3.block_sparse_moe.input_linear.weight",
        "model.layers.3.block_sparse_moe.router.layer.weight",
        "language_model.model.layers.3.mlp.experts.fc1.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "vit.encoder.layer.3.attention.attention.query.weight",
        "vit.encoder.layer.3.attention.output.dense.weight",
        "vit.encoder.layer.3.output.dense.bias",
        "encoder.layer.3.mlp.weights_in.weight",
        "embed_out.weight",
        "language_model.lm_head.weight",
    ];
    for model_type in families::known() {
        let renames = built_in(model_type);
        for name in names {
            let once = renames.canonical(name);
            let twice = renames.canonical(&once.name);
            assert_eq!(once.obstacle, None, "{model_type}: {name}");
            assert_eq!((twice.name, twice.slice), (once.name, None), "{model_type}: {name}");
        }
    }
}

#[test]
fn what_is_split_in_memory_is_a_piece_of_what_is_stored() {
    let dino = built_in("dinov2");
    let stored = "encoder.layer.0.mlp.weights_in.weight";
    assert_eq!(whole(&dino, stored), stored);
    let up = "encoder.layer.0.mlp.up_proj.weight";
    assert_eq!(slice(&dino, up), (stored.to_owned(), None, 1, 2));
}

fn from_json(rules: &str) -> Renames {
    Renames::from_json(rules).expect("sound")
}

#[test]
fn rules_hold_where_they_say() {
    let renames = from_json(
        r#"[{"sources": ["^inner\\.(.+)"], "targets": ["\\1"], "prefixes": ["model.tower.", "tower."]}]"#,
    );
    assert_eq!(whole(&renames, "model.tower.inner.a.weight"), "model.tower.a.weight");
    assert_eq!(whole(&renames, "tower.inner.a.weight"), "tower.a.weight");
    assert_eq!(whole(&renames, "inner.a.weight"), "inner.a.weight");
}

#[test]
fn what_is_no_cutting_into_rows_is_an_obstacle() {
    let renames = from_json(
        r#"[{"sources": ["w13"], "targets": ["gate", "up"],
             "operations": [{"name": "Interleave", "dimension": 1}, {"name": "Chunk", "dimension": 0}]},
            {"sources": ["qkv"], "targets": ["q", "k"],
             "operations": [{"name": "Chunk", "dimension": 0, "plain": false}]},
            {"sources": ["fc0", "fc1"], "targets": ["fc1", "fc2"], "special": "Pairs"},
            {"sources": ["experts"], "targets": ["experts"],
             "operations": [{"name": "Transpose", "dimension": 1}]}]"#,
    );
    for (name, named) in [
        ("layer.w13", "Interleave and Chunk"),
        ("layer.gate", "Interleave and Chunk"),
        ("layer.up", "Interleave and Chunk"),
        ("layer.k", "Chunk"),
        ("layer.fc1", "Pairs"),
    ] {
        let obstacle = renames.canonical(name).obstacle.expect("an obstacle");
        assert!(obstacle.contains(named), "{obstacle}");
    }
    assert_eq!(whole(&renames, "layer.experts"), "layer.experts");
    assert!(matches!(Renames::from_json("{}"), Err(Error::Argument(_))));
    assert!(matches!(
        Renames::from_json(r#"[{"sources": ["("], "targets": ["a"]}]"#),
        Err(Error::Argument(_))
    ));
}
