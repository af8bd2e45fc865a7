//! What lies below an address, as a store of files.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use futures_util::{StreamExt, TryStreamExt};
use lorafast::error::Owner;
use lorafast::storage::file_names;
use lorafast::storage::local::Stamp;
use lorafast::storage::source::Source;
use lorafast::storage::store::Store;
use lorafast::{Error, Result};
use object_store::ObjectMeta;
use object_store::path::Path as ObjectPath;

use crate::address::{Address, Kind};
use crate::connection::Connection;
use crate::failure::{Action, explain};
use crate::runtime;
use crate::source::{Head, RemoteSource, look, stamp_of};

/// What the files are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A checkpoint's, which is never held as a whole.
    Checkpoint,
    /// An adapter's, whose weights are taken as a whole.
    Adapter,
}

/// What is looked for where a server has no listings, beside what only models have.
const LOOKED_FOR: [&str; 24] = [
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin",
    "adapter_model.pt",
    "adapters.safetensors",
    "adapter.safetensors",
    "pytorch_lora_weights.safetensors",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
    "modules.json",
    "sentence_bert_config.json",
    "lorafast_manifest.json",
    "value_head.safetensors",
    "value_head.bin",
    "non_lora_trainables.bin",
    "new_embeddings.safetensors",
    "mm_projector.bin",
];
/// Questions that are open at the same time.
const AT_ONCE: usize = 8;
/// Files whose first bytes are asked for at the same time: they wait for the way there more than for bytes.
const OPENED_AT_ONCE: usize = 16;

/// The files below an address.
#[derive(Debug)]
pub struct ObjectStoreFiles {
    connection: Arc<Connection>,
    root: PathBuf,
    purpose: Use,
    listing: OnceLock<BTreeMap<String, Entry>>,
    /// What was looked at by name, where there is no listing.
    known: Mutex<HashMap<String, Option<Entry>>>,
    /// The first bytes of files that will be opened, or why they did not come: who is told so waits no second
    /// time.
    heads: Mutex<HashMap<String, Result<Head>>>,
}

#[derive(Debug, Clone)]
struct Entry {
    size: u64,
    etag: Option<String>,
    modified: i64,
}

impl Entry {
    fn of(meta: &ObjectMeta) -> Self {
        Self { size: meta.size, etag: meta.e_tag.clone(), modified: meta.last_modified.timestamp() }
    }
}

impl ObjectStoreFiles {
    /// What lies where a connection leads to.
    pub fn new(connection: Arc<Connection>, purpose: Use) -> Self {
        Self::below(connection, None, purpose)
    }

    /// The same of the folder above what it leads to, and the name of that: of a single file.
    pub fn of_file(connection: Arc<Connection>, purpose: Use) -> (Self, String) {
        let path = connection.address.path.clone();
        let text: &str = path.as_ref();
        let (folder, name) = text.rsplit_once('/').unwrap_or(("", text));
        (Self::below(connection, Some(folder), purpose), name.to_owned())
    }

    fn below(connection: Arc<Connection>, folder: Option<&str>, purpose: Use) -> Self {
        let root = match folder {
            Some("") => PathBuf::from(&connection.address.root),
            Some(folder) => PathBuf::from(format!("{}/{folder}", connection.address.root)),
            None => connection.address.name(),
        };
        Self {
            connection,
            root,
            purpose,
            listing: OnceLock::new(),
            known: Mutex::default(),
            heads: Mutex::default(),
        }
    }

    fn prefix(&self) -> ObjectPath {
        let root = self.root.to_string_lossy();
        let path = root.strip_prefix(&self.connection.address.root).unwrap_or_default();
        ObjectPath::parse(path.trim_start_matches('/')).unwrap_or_default()
    }

    fn object(&self, name: &str) -> ObjectPath {
        let prefix = self.prefix();
        let prefix: &str = prefix.as_ref();
        let whole = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        ObjectPath::parse(&whole).unwrap_or_else(|_| ObjectPath::from(whole))
    }

    fn has_listing(&self) -> bool {
        self.connection.address.kind != Kind::Http
    }

    fn listed(&self) -> Result<&BTreeMap<String, Entry>> {
        if let Some(listing) = self.listing.get() {
            return Ok(listing);
        }
        let found = match self.has_listing() {
            true => list(&self.connection, &self.prefix())?,
            false => {
                let names =
                    LOOKED_FOR.iter().chain(&file_names::OF_A_MODEL).map(|name| (*name).to_owned());
                self.look_at_all(names.collect())?
            }
        };
        if found.is_empty() {
            return Err(Error::io(&self.root, io::Error::from_raw_os_error(2)));
        }
        Ok(self.listing.get_or_init(|| found))
    }

    /// Looks at files by name, several at a time.
    fn look_at_all(&self, names: Vec<String>) -> Result<BTreeMap<String, Entry>> {
        let clients = self.connection.clients()?;
        let looked = futures_util::stream::iter(names.into_iter().map(|name| {
            let (path, objects) = (self.object(&name), clients.objects.clone());
            async move {
                match objects.get_opts(&path, self.connection.look_options()).await {
                    Ok(result) => Ok((name, Some(Entry::of(&result.meta)))),
                    Err(error) if self.connection.is_absent(&path, &error) => Ok((name, None)),
                    Err(error) => {
                        Err(explain(&self.connection.address, &path, Action::Read, &error))
                    }
                }
            }
        }));
        let all: Vec<_> = runtime::wait(&self.connection.stop, async {
            looked.buffer_unordered(AT_ONCE).try_collect().await
        })?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.extend(all.iter().cloned());
        Ok(all.into_iter().filter_map(|(name, entry)| Some((name, entry?))).collect())
    }

    fn entry(&self, name: &str) -> Result<Option<Entry>> {
        if self.has_listing() && self.listing.get().is_some() {
            return Ok(self.listed()?.get(name).cloned());
        }
        if let Some(known) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
            return Ok(known.clone());
        }
        if self.has_listing() {
            return Ok(self.listed()?.get(name).cloned());
        }
        {
            let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
            if heads.get(name).is_some_and(Result::is_err)
                && let Some(Err(error)) = heads.remove(name)
            {
                return Err(error);
            }
        }
        let found = look(&self.connection, &self.object(name))?.map(|meta| Entry::of(&meta));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(name.to_owned(), found.clone());
        Ok(found)
    }

    /// The whole content of a file.
    ///
    /// # Errors
    /// As [`Store::read_small`].
    pub fn read_whole(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.read_small(name)?.0)
    }

    /// Where it lies.
    pub fn address(&self) -> &Address {
        &self.connection.address
    }
}

/// All objects below a prefix, by their names from there.
fn list(connection: &Connection, prefix: &ObjectPath) -> Result<BTreeMap<String, Entry>> {
    Ok(list_objects(connection, prefix)?
        .iter()
        .map(|(name, meta)| (name.clone(), Entry::of(meta)))
        .collect())
}

/// The same as the store tells it.
pub(crate) fn list_objects(
    connection: &Connection,
    prefix: &ObjectPath,
) -> Result<BTreeMap<String, ObjectMeta>> {
    let clients = connection.clients()?;
    let whole: &str = prefix.as_ref();
    let given = (!whole.is_empty()).then_some(prefix);
    let objects: Vec<_> =
        connection.ask(prefix, Action::List, clients.objects.list(given).try_collect())?;
    let named = |meta: ObjectMeta| {
        let name: &str = meta.location.as_ref();
        let name =
            if whole.is_empty() { name } else { name.strip_prefix(whole)?.strip_prefix('/')? };
        // Folders that consoles make are empty objects.
        (!name.is_empty()).then(|| (name.to_owned(), meta.clone()))
    };
    Ok(objects.into_iter().filter_map(named).collect())
}

impl Store for ObjectStoreFiles {
    fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("{}/{name}", self.root.display()))
    }

    /// Files and folders at the top, as of a directory.
    fn list(&self) -> Result<Vec<String>> {
        let mut names: Vec<_> = self
            .listed()?
            .keys()
            .map(|name| name.split('/').next().unwrap_or(name).to_owned())
            .collect();
        names.dedup();
        Ok(names)
    }

    fn list_in(&self, folder: &str) -> Result<Vec<String>> {
        if !self.has_listing() {
            let names = LOOKED_FOR.iter().chain(&file_names::OF_A_MODEL);
            let found = self.look_at_all(names.map(|name| format!("{folder}/{name}")).collect())?;
            let within =
                |name: &String| name.strip_prefix(folder)?.strip_prefix('/').map(str::to_owned);
            return Ok(found.keys().filter_map(within).collect());
        }
        let within = |name: &String| {
            let rest = name.strip_prefix(folder)?.strip_prefix('/')?;
            Some(rest.split('/').next().unwrap_or(rest).to_owned())
        };
        let mut names: Vec<_> = self.listed()?.keys().filter_map(within).collect();
        names.dedup();
        Ok(names)
    }

    fn has(&self, name: &str) -> Result<bool> {
        if self.entry(name)?.is_some() {
            return Ok(true);
        }
        let below = format!("{name}/");
        Ok(self.has_listing() && self.listed()?.keys().any(|name| name.starts_with(&below)))
    }

    fn is_file(&self, name: &str) -> bool {
        self.entry(name).is_ok_and(|entry| entry.is_some())
    }

    fn stamp(&self, name: &str) -> Result<Stamp> {
        let mut entry = self.entry(name)?;
        if self.has_listing() && entry.as_ref().is_some_and(|entry| entry.etag.is_none()) {
            // Some stores have no ETags in their listings, and with each object.
            entry = look(&self.connection, &self.object(name))?.map(|meta| Entry::of(&meta));
        }
        let entry =
            entry.ok_or_else(|| Error::io(self.path(name), io::Error::from_raw_os_error(2)))?;
        Ok(stamp_of(
            &self.connection,
            &self.object(name),
            entry.size,
            entry.etag.as_deref(),
            entry.modified,
        ))
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        let source = self.open(name)?;
        let stamp = source.stamp();
        let mut content = vec![0; stamp.length as usize];
        let read = source.read_at(&mut content, 0);
        read.map_err(|error| Owner::Checkpoint.unread(self.path(name), error))?;
        Ok((content, stamp))
    }

    fn follow(&self, stop: &Arc<AtomicBool>) {
        self.connection.follow(stop);
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let (path, is_spooled) = (self.object(name), self.purpose == Use::Adapter);
        let head = self.heads.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        let head = head.unwrap_or_else(|| Head::fetch_now(&self.connection, &path))?;
        Ok(Box::new(RemoteSource::new(&self.connection, &path, head, is_spooled)))
    }

    fn will_open(&self, names: &[String]) {
        let Ok(clients) = self.connection.clients() else { return };
        let fetched = futures_util::stream::iter(names.iter().map(|name| {
            let (path, clients) = (self.object(name), clients.clone());
            async move { (name, Head::fetch(&clients, &path).await) }
        }));
        let fetched: Result<Vec<_>> = runtime::wait(&self.connection.stop, async {
            Ok(fetched.buffer_unordered(OPENED_AT_ONCE).collect().await)
        });
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, head) in fetched.unwrap_or_default() {
            match head {
                Ok(head) => {
                    known.insert(name.clone(), Some(Entry::of(&head.meta)));
                    heads.insert(name.clone(), Ok(head));
                }
                Err(error) if self.connection.is_absent(&self.object(name), &error) => {
                    known.insert(name.clone(), None);
                }
                Err(error) => {
                    let address = &self.connection.address;
                    let error = explain(address, &self.object(name), Action::Read, &error);
                    heads.insert(name.clone(), Err(error));
                }
            }
        }
    }
}
