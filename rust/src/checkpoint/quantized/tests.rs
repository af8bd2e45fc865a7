use super::*;
use crate::fixtures::{Tensor, ramp, write};

/// A checkpoint of one file, with tensors of bytes beside those of numbers.
fn checkpoint(root: &std::path::Path, tensors: &[Tensor<'_>], config: &str) -> Checkpoint {
    write(&root.join("model.safetensors"), tensors);
    std::fs::write(root.join("config.json"), config).expect("written");
    Checkpoint::open(root).expect("sound")
}

/// An int8 scheme over a weight whose codes and scales need not be on disk.
fn scheme(blocks: Blocks, scales: Scales, codes: Codes) -> Quantized {
    let tensor = TensorInfo {
        name: "w.weight".into(),
        dtype: crate::tensor::dtype::Dtype::F32,
        shape: vec![6, 4],
        range: 0..96,
    };
    Quantized {
        logical: tensor.clone(),
        stored: Stored { shard: 0, tensor },
        codes,
        blocks,
        scales,
        companions: Vec::new(),
        transposed: None,
        scheme: String::new(),
    }
}

#[test]
fn a_block_that_did_not_change_keeps_its_bytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let tensors = [
        ("w.weight", crate::tensor::dtype::Dtype::F32, &[6][..], vec![0.0; 6]),
        ("w.scale", crate::tensor::dtype::Dtype::F32, &[3][..], vec![0.5, 2.0, 4.0]),
    ];
    let base = checkpoint(directory.path(), &tensors, "{}");
    let stored = Stored::find(&base, "w.scale").expect("there");
    let blocks = Blocks::Grid { height: 6, width: 4, block_height: 2, block_width: 4, matrices: 1 };
    let scheme = scheme(blocks, Scales::Plain(stored, Steps::All), Codes::E4m3);
    let elements = 0..24;
    let before = scheme.decode(&base, &elements).expect("decoded");
    let mut values = before.clone();
    values[9] = 448.0 * 3.0;
    let encoded = scheme.encode(&base, &elements, &values, &before, None).expect("encoded");
    assert_eq!(encoded.scales, [0.5, 3.0, 4.0]);
    assert!(encoded.changed);
    assert_eq!(encoded.codes[9], 0x7e);
    assert_eq!(encoded.codes[..8], [0; 8]);
    // In two runs of rows, with scales that are known before.
    let halves = [0..12, 12..24];
    let extents: Vec<_> = halves
        .iter()
        .map(|half| scheme.extent(half, &values[half.clone()], &before[half.clone()]))
        .collect();
    let known = scheme.known(&base, &extents).expect("known");
    for half in halves {
        let (values, before) = (&values[half.clone()], &before[half.clone()]);
        let part = scheme.encode(&base, &half, values, before, Some(&known)).expect("encoded");
        assert_eq!(part.codes, encoded.codes[half]);
    }
    let same = scheme.encode(&base, &elements, &before, &before, None).expect("encoded");
    assert!(!same.changed);
    assert_eq!(same.scales, [0.5, 2.0, 4.0]);
}

#[test]
fn what_is_beyond_codes_without_scales_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let tensors = [("w.weight", crate::tensor::dtype::Dtype::F32, &[6, 4][..], ramp(24, 1))];
    let base = checkpoint(directory.path(), &tensors, "{}");
    let blocks = Blocks::Grid { height: 6, width: 4, block_height: 1, block_width: 4, matrices: 1 };
    let scheme = scheme(blocks, Scales::None, Codes::E4m3);
    let mut values = [1f32; 24];
    values[13] = 464.0;
    let encode = |values: &[f32]| scheme.encode(&base, &(0..24), values, &[0.0; 24], None);
    assert_eq!(encode(&values).expect("in reach").codes[13], 0x7e);
    values[14] = -464.1;
    assert!(matches!(encode(&values), Err(Failure::Beyond(14))));
}
