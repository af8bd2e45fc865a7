//! Formats that are recognised only to say that nothing can be merged into them.

use indexmap::{IndexMap, IndexSet};
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;

/// The last part of a tensor's name, what stands for it in the name of the weight, and the format
/// that it gives away, the surest first.
const TENSORS: [(&str, &str, &str); 14] = [
    (".g_idx", ".weight", "GPTQ"),
    (".qzeros", ".weight", "GPTQ or AWQ"),
    (".qweight", ".weight", "GPTQ or AWQ"),
    (".W_q", ".weight", "HQQ"),
    (".codebooks", ".weight", "AQLM"),
    (".centroids.weight", ".weight", "VPTQ"),
    (".qweight_type", ".weight", "GGUF"),
    ("._data", "", "quanto"),
    ("._weight_qdata", ".weight", "torchao"),
    ("._qdata", "", "torchao"),
    (".dense_weights", ".weight", "SpQR"),
    (".Qidxs", ".weight", "QuIP#"),
    (".qweight_scales", ".weight", "FBGEMM's integers"),
    (".weights_scaling_factor", ".weight", "TensorRT"),
];
/// The methods of transformers' quantization_config and the formats' names.
const METHODS: [(&str, &str); 20] = [
    ("gptq", "GPTQ"),
    ("awq", "AWQ"),
    ("hqq", "HQQ"),
    ("aqlm", "AQLM"),
    ("eetq", "EETQ"),
    ("torchao", "torchao"),
    ("quanto", "quanto"),
    ("spqr", "SpQR"),
    ("vptq", "VPTQ"),
    ("higgs", "HIGGS"),
    ("bitnet", "BitNet"),
    ("fp_quant", "FP-Quant"),
    ("auto-round", "AutoRound"),
    ("intel/auto-round", "AutoRound"),
    ("quip", "QuIP#"),
    ("sinq", "SINQ"),
    ("nvfp4", "NVFP4"),
    ("gguf", "GGUF"),
    ("metal", "Metal's integers"),
    ("fouroversix", "Four Over Six"),
];

/// The config's entry on quantisation, wherever it stands; of a pipeline that of the first component
/// that has one.
pub(super) fn quantization(checkpoint: &Checkpoint) -> Option<&Map<String, Value>> {
    fn find(config: &Map<String, Value>) -> Option<&Map<String, Value>> {
        let own = |key: &str| config.get(key).and_then(Value::as_object);
        own("quantization_config").or_else(|| own("compression_config")).or_else(|| {
            let inner = config.iter().filter(|(key, _)| key.ends_with("_config"));
            inner.filter_map(|(_, value)| value.as_object()).find_map(find)
        })
    }
    checkpoint.configs().into_iter().find_map(|(_, (fields, _), _)| find(fields))
}

/// What a base holds in a format that cannot be merged into.
#[derive(Debug, Clone)]
pub struct UnsupportedFormat {
    /// The format's name.
    pub format: String,
    /// The weights in it, by the names that the model gives them.
    weights: IndexSet<String>,
    /// By the name of a tensor that no model has: the weight that it stands for. One for each weight.
    stand_ins: IndexMap<String, String>,
}

impl UnsupportedFormat {
    /// The format that a base's tensors or its config give away.
    pub fn of(checkpoint: &Checkpoint) -> Option<Self> {
        let method =
            quantization(checkpoint).and_then(|config| config.get("quant_method")?.as_str());
        let named = method.and_then(|method| {
            METHODS.iter().find(|(name, _)| *name == method).map(|(_, format)| *format)
        });
        let mut format = None;
        let mut weights = IndexSet::new();
        let mut stand_ins = IndexMap::new();
        for (ending, own, guess) in TENSORS {
            for name in checkpoint.tensors().keys() {
                let Some(start) = name.strip_suffix(ending) else { continue };
                if own.is_empty() && !start.contains('.') {
                    continue;
                }
                let weight = format!("{start}{own}");
                if weights.insert(weight.clone()) && checkpoint.tensor(&weight).is_none() {
                    stand_ins.insert(name.clone(), weight);
                }
                format.get_or_insert(guess);
            }
        }
        // What is stored as integers under the usual name.
        if named.is_some() {
            for (name, location) in checkpoint.tensors() {
                let is_float = checkpoint.at(*location).dtype.is_mergeable();
                let is_read = checkpoint.tensor(&format!("{name}_scale_2")).is_some();
                if name.ends_with(".weight") && !is_float && !is_read {
                    weights.insert(name.clone());
                }
            }
        }
        let format = named.or(format).filter(|_| !weights.is_empty())?.to_owned();
        Some(Self { format, weights, stand_ins })
    }

    /// How many weights there are in it.
    pub fn count(&self) -> usize {
        self.weights.len()
    }

    /// Whether a weight, by the name that the model gives it, is in the format.
    pub fn holds(&self, weight: &str) -> bool {
        self.weights.contains(weight)
    }

    /// These by their names.
    pub fn weights(&self) -> impl Iterator<Item = &str> {
        self.weights.iter().map(String::as_str)
    }

    /// Whether a tensor belongs to a module in the format.
    pub fn holds_tensor(&self, name: &str) -> bool {
        let module = name.rsplit_once('.').map(|(module, _)| module);
        let of_module = |module: &str| {
            self.weights.contains(module) || self.weights.contains(&format!("{module}.weight"))
        };
        self.weights.contains(name) || module.is_some_and(of_module)
    }

    /// The weight for which a tensor stands that no model has.
    pub fn weight_of(&self, name: &str) -> Option<&str> {
        self.stand_ins.get(name).map(String::as_str)
    }

    /// What to do instead.
    pub fn advice(&self) -> String {
        format!(
            "{} has no weights that an update could be added to; merge into the unquantised base \
             and quantise the result again",
            self.format
        )
    }
}
