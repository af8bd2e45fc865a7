//! Formats that are recognised only to say that nothing can be merged into them.

use indexmap::IndexSet;
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;

/// The last part of a tensor's name and the format that it gives away, the surest first.
const TENSORS: [(&str, &str); 16] = [
    (".g_idx", "GPTQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
    (".W_q", "HQQ"),
    (".codebooks", "AQLM"),
    (".weight_packed", "compressed-tensors' packed integers"),
    ("_blocks", "MXFP4"),
    (".weight_scale_2", "NVFP4"),
    (".qweight_type", "GGUF"),
    (".weight._data", "quanto"),
    (".weight._qdata", "torchao"),
    (".dense_weights", "SpQR"),
    (".Qidxs", "QuIP#"),
    (".qweight_scales", "FBGEMM's integers"),
    (".weight_shape", "compressed-tensors' packed integers"),
    (".weights_scaling_factor", "TensorRT"),
];
/// The methods of transformers' quantization_config and the formats' names.
const METHODS: [(&str, &str); 19] = [
    ("gptq", "GPTQ"),
    ("awq", "AWQ"),
    ("hqq", "HQQ"),
    ("aqlm", "AQLM"),
    ("eetq", "EETQ"),
    ("torchao", "torchao"),
    ("mxfp4", "MXFP4"),
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
    /// The modules in it.
    modules: IndexSet<String>,
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
        let mut modules = IndexSet::new();
        for (ending, guess) in TENSORS {
            for name in checkpoint.tensors().keys() {
                let Some(module) = name.strip_suffix(ending) else { continue };
                if ending == "_blocks" && checkpoint.tensor(&format!("{module}_scales")).is_none() {
                    continue;
                }
                modules.insert(module.to_owned());
                format.get_or_insert(guess);
            }
        }
        // What is stored as integers under the usual name.
        if named.is_some() {
            for (name, location) in checkpoint.tensors() {
                let is_float = checkpoint.at(*location).dtype.is_mergeable();
                if let Some(module) = name.strip_suffix(".weight").filter(|_| !is_float) {
                    modules.insert(module.to_owned());
                }
            }
        }
        let format = named.or(format).filter(|_| !modules.is_empty())?.to_owned();
        Some(Self { format, modules })
    }

    /// How many modules there are in it.
    pub fn count(&self) -> usize {
        self.modules.len()
    }

    /// The paths of these.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(String::as_str)
    }

    /// Whether a tensor belongs to a module in the format.
    pub fn holds_tensor(&self, name: &str) -> bool {
        name.rsplit_once('.').is_some_and(|(module, _)| self.modules.contains(module))
    }

    /// The module of that path, of which either's name may have a leading part more.
    pub fn module(&self, path: &str) -> Option<&str> {
        let ends = |long: &str, short: &str| {
            long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'))
        };
        let alike = |module: &&String| ends(module, path) || ends(path, module);
        let found = self.modules.get(path).or_else(|| self.modules.iter().find(alike));
        found.map(String::as_str)
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
