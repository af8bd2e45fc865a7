use std::fs;

use super::*;
use crate::adapter::formats::peft::Peft;
use crate::fixtures::{Tensor as Written, ramp, write, write_adapter};
use crate::kernel::convert::widen_f64;
use crate::tensor::dtype::Dtype;

/// s·B·A of every product, by the module's path and the expert.
fn products(adapter: &Adapter) -> Vec<(String, Vec<f64>)> {
    let mut all = Vec::new();
    for module in adapter.modules().values() {
        for (number, expert) in module.products().enumerate() {
            let pair = module.pair(expert, None, None).expect("read");
            let (a, b) = (widen_f64(&pair.a_dtype, &pair.a), widen_f64(&pair.b_dtype, &pair.b));
            let element = |row: usize, column: usize| {
                let terms =
                    (0..pair.rank).map(|k| b[row * pair.rank + k] * a[k * pair.inputs + column]);
                terms.sum::<f64>() * module.scaling
            };
            let product = (0..pair.outputs)
                .flat_map(|row| (0..pair.inputs).map(move |column| (row, column)))
                .map(|(row, column)| element(row, column))
                .collect();
            let own = module.only_parameter().map_or("", |parameter| &parameter.name);
            all.push((format!("{} {own} {number}", module.path), product));
        }
    }
    all.sort_by(|left, right| left.0.cmp(&right.0));
    all
}

fn assert_same(left: &Adapter, right: &Adapter) {
    let (left, right) = (products(left), products(right));
    assert_eq!(left.len(), right.len());
    for ((name, values), (other, others)) in left.iter().zip(&right) {
        assert_eq!(name, other);
        for (value, other) in values.iter().zip(others) {
            assert!(
                (value - other).abs() <= 1e-6 * value.abs().max(1e-6),
                "{name}: {value} {other}"
            );
        }
    }
}

const MODULES: [(&str, u64, u64); 3] = [
    ("model.layers.0.q_proj", 6, 5),
    ("model.layers.0.up_proj", 9, 5),
    ("model.layers.1.q_proj", 6, 5),
];

fn mlx(root: &Path, tensors: &[(&str, &[u64])], config: &str) -> Adapter {
    let tensors: Vec<Written<'_>> = (tensors.iter())
        .enumerate()
        .map(|(seed, (name, shape))| {
            (*name, Dtype::F32, *shape, ramp(shape.iter().product(), seed as u64))
        })
        .collect();
    fs::create_dir_all(root).expect("made");
    write(&root.join(WEIGHTS), &tensors);
    fs::write(root.join(peft::config::FILE_NAME), config).expect("written");
    Adapter::open(root).expect("sound")
}

#[test]
fn peft_to_mlx_and_back_adds_the_same() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    for (number, fields) in
        ["", r#", "alpha_pattern": {"layers.1.q_proj": 0.3}"#].iter().enumerate()
    {
        let adapter =
            Adapter::open(&write_adapter(&root.join(format!("p{number}")), &MODULES, fields));
        let adapter = adapter.expect("sound");
        let target = root.join(format!("m{number}"));
        Mlx.write(&adapter, &target, &WriteOptions::default()).expect("written");
        let own = Adapter::open(&target).expect("sound");
        assert_eq!(own.format(), "mlx");
        assert_same(&own, &adapter);
        // One scale of all is kept, and the factors are what they were.
        let scales: Vec<f64> = own.modules().values().map(|module| module.scaling).collect();
        let first = adapter.modules()[0].scaling;
        assert_eq!(scales, [if number == 0 { first } else { 1.0 }; 3]);
    }
}

#[test]
fn what_mlx_wrote_is_written_as_it_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let at = "model.layers.0.mlp.switch_mlp.up_proj";
    let tensors: &[(&str, &[u64])] = &[
        ("model.layers.0.q.lora_a", &[5, 2]),
        ("model.layers.0.q.lora_b", &[2, 6]),
        (&format!("{at}.lora_a"), &[3, 2, 5]),
        (&format!("{at}.lora_b"), &[3, 6, 2]),
        ("model.embed_tokens.lora_a", &[7, 2]),
        ("model.embed_tokens.lora_b", &[2, 5]),
    ];
    let config = r#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3}}"#;
    let adapter = mlx(&root.join("first"), tensors, config);
    Mlx.write(&adapter, &root.join("second"), &WriteOptions::default()).expect("written");
    let again = Adapter::open(&root.join("second")).expect("sound");
    assert_same(&again, &adapter);
    for (name, _) in tensors {
        let read = |adapter: &Adapter| adapter.tensor(name).expect("there").read().expect("read");
        assert_eq!(read(&again), read(&adapter), "{name}");
    }
    let dora: &[(&str, &[u64])] = &[
        ("model.embed_tokens.lora_a", &[7, 2]),
        ("model.embed_tokens.lora_b", &[2, 5]),
        ("model.embed_tokens.m", &[7]),
    ];
    let config = r#"{"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 3}}"#;
    let adapter = mlx(&root.join("third"), dora, config);
    assert!(adapter.modules()[0].delta.is_by_tokens());
    Mlx.write(&adapter, &root.join("fourth"), &WriteOptions::default()).expect("written");
    let again = Adapter::open(&root.join("fourth")).expect("sound");
    assert_same(&again, &adapter);
    assert_eq!(again.summary()["type"], "DORA");
    // PEFT has a magnitude for each column.
    let refused =
        Peft.write(&again, &root.join("fifth"), &WriteOptions::default()).expect_err("of tokens");
    assert!(refused.to_string().contains("no product of two stored"), "{refused}");
}

#[test]
fn lower_ranks_are_filled_with_zeros() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let key = |module: &str, part: &str| {
        format!("base_model.model.model.layers.{module}.lora_{part}.weight")
    };
    let names = [key("0.q", "A"), key("0.q", "B"), key("1.q", "A"), key("1.q", "B")];
    let shapes: [&[u64]; 4] = [&[2, 5], &[6, 2], &[4, 5], &[6, 4]];
    let tensors: Vec<Written<'_>> = (names.iter().zip(shapes))
        .map(|(name, shape)| (name.as_str(), Dtype::F32, shape, ramp(shape.iter().product(), 3)))
        .collect();
    let fields = r#", "rank_pattern": {"layers.1.q": 4}"#;
    let first = write_adapter(&root.join("first"), &[], fields);
    write(&first.join(peft::WEIGHTS), &tensors);
    let adapter = Adapter::open(&first).expect("sound");
    Mlx.write(&adapter, &root.join("second"), &WriteOptions::default()).expect("written");
    let own = Adapter::open(&root.join("second")).expect("sound");
    assert_eq!(own.tensor("model.layers.0.q.lora_a").expect("there").shape, [5, 4]);
    assert_same(&own, &adapter);
}

#[test]
fn what_mlx_cannot_say_is_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let refused = |fields: &str, name: &str| {
        let adapter = Adapter::open(&write_adapter(&root.join(name), &MODULES, fields));
        let target = root.join(format!("{name} out"));
        let error = Mlx
            .write(&adapter.expect("sound"), &target, &WriteOptions::default())
            .expect_err("refused");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(!target.exists());
        error.to_string()
    };
    assert!(refused(r#", "init_lora_weights": "pissa""#, "pissa").contains("changed the base"));
    let ranges = r#", "layer_replication": [[0, 1], [0, 2]]"#;
    assert!(refused(ranges, "repeated").contains("changed the base"));
}

#[test]
fn keys_have_a_module_and_a_part() {
    assert_eq!(split("model.layers.0.q.lora_a"), Some(("model.layers.0.q", 0)));
    assert_eq!(split("model.layers.0.q.lora_b"), Some(("model.layers.0.q", 1)));
    assert_eq!(split("model.layers.0.q.m"), Some(("model.layers.0.q", 2)));
    assert_eq!(split("model.layers.0.q.A"), Some(("model.layers.0.q", 0)));
    assert_eq!(split("model.layers.0.q.B"), Some(("model.layers.0.q", 1)));
    assert_eq!(split("model.layers.0.q.weight"), None);
}

#[test]
fn experts_stand_where_other_programs_have_them() {
    for (own, other) in [
        ("model.layers.3.mlp.switch_mlp.gate_proj", "model.layers.3.mlp.experts.gate_proj"),
        ("layers.3.experts.switch_glu.up_proj", "layers.3.experts.up_proj"),
        ("model.layers.3.mlp.experts.up_proj", "model.layers.3.mlp.experts.up_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
    ] {
        assert_eq!(hugging_face_path(own), other);
    }
}

#[test]
fn states_of_the_training_are_numbered() {
    for (name, expected) in [
        ("adapters.safetensors", true),
        ("adapters.npz", true),
        ("0000100_adapters.safetensors", true),
        ("my_adapters.safetensors", false),
        ("adapter_model.safetensors", false),
    ] {
        assert_eq!(is_weights(name), expected, "{name}");
    }
}
