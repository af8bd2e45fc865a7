//! Small checkpoints and adapters on disk, for tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::kernel::convert;
use crate::plan::{Inputs, Options};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, TensorInfo};

/// A tensor to write: name, type, shape, values.
pub type Tensor<'a> = (&'a str, Dtype, &'a [u64], Vec<f32>);

/// Values that differ from each other and stay small.
pub fn ramp(count: u64, seed: u64) -> Vec<f32> {
    (0..count).map(|index| ((index * 37 + seed * 101) % 251) as f32 / 128.0 - 1.0).collect()
}

/// Writes a safetensors file.
pub fn write(path: &Path, tensors: &[Tensor<'_>]) {
    let mut data = Vec::new();
    let mut header = Header::default();
    for (name, dtype, shape, values) in tensors {
        let wide: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut bytes = vec![0; values.len() * dtype.size()];
        // Some tests want infinities.
        let _ = convert::convert(&Dtype::F32, &wide, dtype, &mut bytes);
        let start = data.len() as u64;
        header.tensors.push(TensorInfo {
            name: (*name).to_owned(),
            dtype: dtype.clone(),
            shape: shape.to_vec(),
            range: start..start + bytes.len() as u64,
        });
        data.append(&mut bytes);
    }
    header.metadata.insert("format".into(), "pt".into());
    let mut bytes = header.encode();
    bytes.append(&mut data);
    fs::create_dir_all(path.parent().expect("a parent")).expect("made");
    fs::write(path, bytes).expect("written");
}

/// Writes an adapter of rank 2 and alpha 4 with a pair of factors for each module, which maps
/// `inputs` to `outputs`.
pub fn write_adapter(directory: &Path, modules: &[(&str, u64, u64)], fields: &str) -> PathBuf {
    let names: Vec<_> = modules
        .iter()
        .map(|(module, ..)| {
            ["A", "B"].map(|side| format!("base_model.model.{module}.lora_{side}.weight"))
        })
        .collect();
    let shapes: Vec<_> =
        modules.iter().map(|(_, outputs, inputs)| [[2, *inputs], [*outputs, 2]]).collect();
    let tensors: Vec<Tensor<'_>> = (names.iter().zip(&shapes))
        .flat_map(|(names, shapes)| [(&names[0], &shapes[0]), (&names[1], &shapes[1])])
        .enumerate()
        .map(|(seed, (name, shape))| {
            (name.as_str(), Dtype::F32, &shape[..], ramp(shape[0] * shape[1], seed as u64))
        })
        .collect();
    write(&directory.join("adapter_model.safetensors"), &tensors);
    let config = format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 4{fields}}}"#);
    fs::write(directory.join("adapter_config.json"), config).expect("written");
    directory.to_path_buf()
}

/// Opens a base and adapters.
pub fn open(base: &Path, adapters: &[PathBuf]) -> Inputs {
    Inputs {
        base: Arc::new(Checkpoint::open(base).expect("a sound base")),
        adapters: adapters
            .iter()
            .map(|path| Arc::new(Adapter::open(path).expect("a sound adapter")))
            .collect(),
    }
}

/// Every adapter at its full scale, nothing converted.
pub fn plain() -> Options {
    Options::default()
}
