//! What a directory is by the names in it, and in the folders right below it.

use std::path::Path;

use super::{Identity, of_file};
use crate::error::Owner;
use crate::storage::directory::LocalDirectory;
use crate::storage::file_names::{self, ADAPTER_FILES, OF_A_MODEL};
use crate::storage::store::Store;

/// Names that a message lists before it counts the others.
const LISTED: usize = 3;
/// Folders that are looked into.
const LOOKED_INTO: usize = 1000;

/// What a directory is that is no adapter, or no model, by the names in it.
pub fn of_folder(store: &dyn Store, wanted: Owner) -> Option<Identity> {
    let mut names = store.list().ok()?;
    names.sort_by_key(|name| natural(name));
    let folder = Folder { store, names };
    folder
        .hub_cache()
        .or_else(|| folder.training_run())
        .or_else(|| folder.sharded_checkpoint())
        .or_else(|| folder.folders_below(wanted))
        .or_else(|| folder.whole_model(wanted))
        .or_else(|| folder.one_file())
        .or_else(|| folder.without_weights())
}

struct Folder<'a> {
    store: &'a dyn Store,
    /// In the order of the numbers in them.
    names: Vec<String>,
}

impl Folder<'_> {
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|other| other == name)
    }

    /// The entries whose names begin and end so, with something in between.
    fn like<'a>(&'a self, begin: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
        let is_like = move |name: &&str| {
            name.len() > begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end)
        };
        self.names.iter().map(String::as_str).filter(is_like)
    }

    /// The names in a folder below.
    fn within(&self, folder: &str) -> Vec<String> {
        let Some(root) = self.store.as_directory() else { return Vec::new() };
        let mut names = LocalDirectory(root.join(folder)).list().unwrap_or_default();
        names.sort_by_key(|name| natural(name));
        names
    }

    /// The cache of one repository of the hub's, or the cache of all.
    fn hub_cache(&self) -> Option<Identity> {
        let cached = |name: &str| -> Vec<String> {
            self.within(name).into_iter().filter(|name| !name.starts_with('.')).collect()
        };
        if self.has("snapshots") && (self.has("refs") || self.has("blobs")) {
            let what = match repository(self.store.root()) {
                Some(repository) => format!("the hub's cache of {repository}"),
                None => "the hub's cache of a repository".to_owned(),
            };
            let snapshots = cached("snapshots");
            let main = self.store.read_small("refs/main").ok();
            let main = main.map(|(text, _)| String::from_utf8_lossy(&text).trim().to_owned());
            let main = main.filter(|main| snapshots.contains(main));
            let advice = match main.or_else(|| snapshots.last().cloned()) {
                Some(snapshot) => format!("give its snapshot, the folder snapshots/{snapshot}"),
                None => "it has no snapshot: fetch the repository again".to_owned(),
            };
            return Some(Identity::new(what, advice));
        }
        let repositories: Vec<_> = self.like("models--", "").collect();
        let first = repositories.iter().find_map(|name| repository(Path::new(name)))?;
        Some(Identity::new(
            format!("the hub's cache, with {}", counted(&repositories, "model")),
            format!("give a model's id, such as {first}, or the folder of a snapshot"),
        ))
    }

    /// Where a trainer saves its checkpoints.
    fn training_run(&self) -> Option<Identity> {
        let is_checkpoint = |name: &&str| {
            let number = name.rsplit(['-', '_']).next().unwrap_or_default();
            !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit())
        };
        let checkpoints: Vec<_> = (self.like("checkpoint", ""))
            .filter(is_checkpoint)
            .filter(|name| !self.store.is_file(name))
            .collect();
        let last = checkpoints.last()?;
        Some(Identity::new(
            format!(
                "the directory of a training run, with {}",
                counted(&checkpoints, "checkpoint")
            ),
            format!("give one of these, such as {last}"),
        ))
    }

    /// What trainers over many processes save: weights that somebody has to gather.
    fn sharded_checkpoint(&self) -> Option<Identity> {
        let steps = self.like("global_step", "").find(|name| !self.store.is_file(name));
        let of_zero = || self.like("zero_pp_rank_", "").chain(self.like("mp_rank_", ".pt")).next();
        if steps.is_some() || of_zero().is_some() {
            return Some(Identity::new(
                "a checkpoint of DeepSpeed's, whose weights lie apart for each process",
                "make one file of them with zero_to_fp32.py, which DeepSpeed saves beside them",
            ));
        }
        let fsdp = self.like("pytorch_model_fsdp_", "").find(|name| !self.store.is_file(name));
        if fsdp.is_some() || self.like("__", ".distcp").next().is_some() {
            return Some(Identity::new(
                "a checkpoint of FSDP's, whose weights lie apart for each process \
                 (torch.distributed.checkpoint)",
                "make one file of them with `accelerate merge-weights`",
            ));
        }
        let iterations = self.like("iter_", "").find(|name| !self.store.is_file(name));
        if self.has("latest_checkpointed_iteration.txt")
            || self.has("context") && self.has("weights")
        {
            let which = iterations.map_or(String::new(), |name| format!(" ({name})"));
            return Some(Identity::new(
                format!("a checkpoint of Megatron's or NeMo's{which}"),
                "export it to Hugging Face's format (Megatron-Bridge does)",
            ));
        }
        None
    }

    fn whole_model(&self, wanted: Owner) -> Option<Identity> {
        if wanted == Owner::Checkpoint {
            return None;
        }
        let [config, ..] = OF_A_MODEL;
        if self.has("model_index.json") {
            return Some(Identity::new(
                "a diffusers pipeline, not an adapter",
                "give it, or one of its components, as the base",
            ));
        }
        let weights = self.names.iter().any(|name| file_names::holds_weights(name));
        (self.has(config) && weights).then(|| {
            Identity::new(
                "a whole model, not an adapter",
                "give it as the base, and an adapter here",
            )
        })
    }

    /// A directory whose folders are what was asked for.
    fn folders_below(&self, wanted: Owner) -> Option<Identity> {
        let marks: &[&str] = match wanted {
            Owner::Adapter => &ADAPTER_FILES,
            Owner::Checkpoint => &OF_A_MODEL[..1],
        };
        let holds = |name: &&String| {
            !name.starts_with('.')
                && marks.iter().any(|mark| self.store.is_file(&format!("{name}/{mark}")))
        };
        let found: Vec<&str> =
            self.names.iter().take(LOOKED_INTO).filter(holds).map(String::as_str).collect();
        let noun = if wanted == Owner::Adapter { "adapter" } else { "model" };
        let advice = match found.as_slice() {
            [] => return None,
            [only] => format!("give that folder, {only}"),
            _ => "give one of these folders".to_owned(),
        };
        let what = match found.len() {
            1 => format!("no {noun} itself, but a folder in it is one"),
            _ => format!("no {noun} itself, but its folders are: {}", counted(&found, noun)),
        };
        Some(Identity::new(what, advice))
    }

    /// A directory with one weights file, which is not what its name says.
    fn one_file(&self) -> Option<Identity> {
        let mut weights = self.names.iter().filter(|name| file_names::holds_weights(name));
        let (Some(only), None) = (weights.next(), weights.next()) else { return None };
        if only.ends_with(".safetensors") {
            return None;
        }
        let found = of_file(self.store, only)?;
        Some(Identity::new(
            format!("a directory whose weights, {only}, are {}", found.what),
            found.advice,
        ))
    }

    fn without_weights(&self) -> Option<Identity> {
        if self.names.iter().any(|name| file_names::holds_weights(name)) {
            return None;
        }
        let visible: Vec<_> =
            (self.names.iter().map(String::as_str)).filter(|name| !name.starts_with('.')).collect();
        if visible.is_empty() {
            return Some(Identity::new("an empty directory", "fetch what should be in it again"));
        }
        Some(Identity::new(
            format!("a directory without weights, with {}", counted(&visible, "entr")),
            "give the directory that holds them",
        ))
    }
}

/// Whether an entry of an adapter's or a model's directory is what training left there to go on with:
/// states of optimizers, of random numbers, of processes; no weights that a model is used with.
pub fn state_of_training(name: &str) -> bool {
    const STEMS: [&str; 14] = [
        "optimizer",
        "optim",
        "scheduler",
        "lr_scheduler",
        "scaler",
        "sampler",
        "rng_state",
        "random_states",
        "training_args",
        "trainer_state",
        "pytorch_model_fsdp",
        "custom_checkpoint",
        "dl_state_dict",
        "zero_pp_rank",
    ];
    let lower = name.to_lowercase();
    let (stem, ending) = lower.split_once('.').unwrap_or((&lower, ""));
    let is_numbered = |rest: &str| {
        rest.split(['_', '-']).all(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let is_state = STEMS.iter().any(|known| stem.strip_prefix(known).is_some_and(is_numbered));
    // mlx-lm saves an adapter as it was after some steps beside the last one.
    let of_steps = lower.strip_suffix("_adapters.safetensors");
    (is_state && !ending.ends_with("safetensors"))
        || of_steps.is_some_and(|steps| steps.bytes().all(|digit| digit.is_ascii_digit()))
        || lower.contains("optim_states.")
        || lower.contains("model_states.")
        || lower.ends_with(".distcp")
}

/// The id of a repository by the folder that the hub's cache has for it.
fn repository(folder: &Path) -> Option<String> {
    let name = folder.file_name()?.to_str()?;
    Some(name.strip_prefix("models--")?.replace("--", "/"))
}

/// The first of some names, and how many there are.
fn counted(names: &[&str], noun: &str) -> String {
    let plural = match (names.len(), noun) {
        (1, "entr") => "y",
        (_, "entr") => "ies",
        (1, _) => "",
        _ => "s",
    };
    let listed = names.iter().take(LISTED).copied().collect::<Vec<_>>().join(", ");
    let more = if names.len() > LISTED { ", …" } else { "" };
    format!("{} {noun}{plural} ({listed}{more})", names.len())
}

/// A key that puts `checkpoint-500` before `checkpoint-1000`: each number with its length before it.
fn natural(name: &str) -> String {
    let mut key = String::with_capacity(name.len() + 4);
    let mut digits = String::new();
    for letter in name.chars().chain(['\0']) {
        if letter.is_ascii_digit() {
            digits.push(letter);
            continue;
        }
        if !digits.is_empty() {
            let number = digits.trim_start_matches('0');
            key.push_str(&format!("{:04}{number}", number.len()));
            digits.clear();
        }
        key.push(letter);
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_of_training_are_told_from_weights() {
        for name in [
            "optimizer.pt",
            "optimizer_0.bin",
            "scheduler.pt",
            "rng_state.pth",
            "rng_state_3.pth",
            "random_states_0.pkl",
            "training_args.bin",
            "pytorch_model_fsdp.bin",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "mp_rank_00_model_states.pt",
        ] {
            assert!(state_of_training(name), "{name}");
        }
        for name in [
            "value_head.bin",
            "non_lora_trainables.bin",
            "optimizer_head.safetensors",
            "optimized.bin",
            "scaler_head.pt",
            "adapter_model.bin",
        ] {
            assert!(!state_of_training(name), "{name}");
        }
    }

    #[test]
    fn numbers_are_compared_as_numbers() {
        let mut names = ["checkpoint-1000", "checkpoint-500", "checkpoint-20"];
        names.sort_by_key(|name| natural(name));
        assert_eq!(names, ["checkpoint-20", "checkpoint-500", "checkpoint-1000"]);
    }
}
