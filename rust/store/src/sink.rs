//! An upload as a sink: parts that are written in any order, sent when they are full, and made an object when the
//! last of them has arrived.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use lorafast::storage::local::CopyError;
use lorafast::storage::sink::{Sink, take_through_buffer};
use lorafast::storage::source::Source;
use lorafast::{Error, Result};
use object_store::multipart::PartId;
use object_store::path::Path as ObjectPath;
use object_store::{
    Attribute, Attributes, GetOptions, MultipartId, PutMode, PutMultipartOptions, PutOptions,
    PutPayload,
};

use crate::buffers::Buffer;
use crate::connection::Connection;
use crate::failure::{Action, Words, explain};
use crate::runtime;

const MIB: u64 = 1 << 20;
/// The size of a part, unless there would be too many of them.
const PART: u64 = 8 * MIB;
/// Stores take 10,000 parts at most.
const MOST_PARTS: u64 = 9_000;
/// How often a waiting thread looks whether it is still to wait.
const STEP: Duration = Duration::from_millis(50);
/// What an upload is marked with, by which it is known when the answer to its end was lost.
const MARK: &str = "lorafastupload";

/// The size of all parts but the last.
pub(crate) fn part_size(bytes: u64) -> u64 {
    PART.max(bytes.div_ceil(MOST_PARTS).div_ceil(MIB) * MIB)
}

/// What was written, as the store tells it.
#[derive(Debug, Clone)]
pub(crate) struct Receipt {
    pub bytes: u64,
    pub etag: Option<String>,
}

/// What is done with a receipt before the last write returns.
pub(crate) type Finish = Box<dyn Fn(&Receipt) -> Result<()> + Send + Sync>;

/// An object under construction.
#[derive(Debug)]
pub(crate) struct Upload {
    connection: Arc<Connection>,
    path: ObjectPath,
    bytes: u64,
    part: u64,
    mark: String,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Parts of which something is still missing.
    open: HashMap<u64, Open>,
    id: Option<MultipartId>,
    parts: Vec<Option<PartId>>,
    in_flight: usize,
    written: u64,
    failure: Option<Error>,
    receipt: Option<Receipt>,
    is_over: bool,
}

#[derive(Debug)]
struct Open {
    buffer: Buffer,
    filled: u64,
}

impl Upload {
    pub fn new(connection: Arc<Connection>, path: ObjectPath, bytes: u64) -> Arc<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mark =
            format!("{now:x}-{:x}-{:x}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (state, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Self { connection, path, bytes, part: part_size(bytes), mark, state, changed })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn explain(&self, error: &object_store::Error) -> Error {
        explain(&self.connection.address, &self.path, Action::Write, error)
    }

    fn length_of(&self, part: u64) -> u64 {
        self.part.min(self.bytes - part * self.part)
    }

    /// Writes at a position. Returns whether that was the last that was missing.
    ///
    /// # Errors
    /// Those of the store, of this part or of an earlier one.
    pub fn write_at(self: &Arc<Self>, mut bytes: &[u8], mut offset: u64) -> Result<bool> {
        while !bytes.is_empty() {
            let part = offset / self.part;
            let within = offset - part * self.part;
            let length = (self.length_of(part) - within).min(bytes.len() as u64);
            self.write_in_part(part, within, &bytes[..length as usize])?;
            bytes = &bytes[length as usize..];
            offset += length;
        }
        let mut state = self.lock();
        let is_last = state.written == self.bytes && !state.is_over;
        state.is_over |= is_last;
        Ok(is_last)
    }

    fn write_in_part(self: &Arc<Self>, part: u64, within: u64, bytes: &[u8]) -> Result<()> {
        let length = self.length_of(part);
        let mut state = self.lock();
        if !state.open.contains_key(&part) {
            state = self.make_room(state, length)?;
            if state.open.contains_key(&part) {
                // Another thread has begun it while this one waited.
                self.connection.budget.give_back_write(length);
            }
        }
        raise(&mut state)?;
        let fresh = || {
            let mut buffer = self.connection.budget.buffers.take(length as usize);
            buffer.content.resize(length as usize, 0);
            Open { buffer, filled: 0 }
        };
        let open = state.open.entry(part).or_insert_with(fresh);
        let start = within as usize;
        open.buffer.content[start..start + bytes.len()].copy_from_slice(bytes);
        open.filled += bytes.len() as u64;
        let is_full = open.filled >= length;
        state.written += bytes.len() as u64;
        if is_full && let Some(open) = state.open.remove(&part) {
            self.send(&mut state, part, open.buffer)?;
        }
        Ok(())
    }

    /// Waits until the budget has room for another part, or nothing is on its way that would make any.
    fn make_room<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        length: u64,
    ) -> Result<MutexGuard<'a, State>> {
        let budget = &self.connection.budget;
        loop {
            raise(&mut state)?;
            if budget.take_for_write(length) {
                return Ok(state);
            }
            if state.in_flight == 0 {
                budget.force_for_write(length);
                return Ok(state);
            }
            if self.connection.stop.is_raised() {
                return Err(Error::Cancelled);
            }
            state =
                self.changed.wait_timeout(state, STEP).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends a full part, without waiting for it.
    fn send(self: &Arc<Self>, state: &mut State, part: u64, buffer: Buffer) -> Result<()> {
        let clients = self.connection.clients()?;
        state.in_flight += 1;
        let own = self.clone();
        let is_whole = self.bytes <= self.part;
        let length = buffer.len() as u64;
        runtime::handle().spawn(async move {
            let payload = PutPayload::from(bytes::Bytes::from_owner(buffer));
            let sent = match is_whole {
                true => own.put_whole(&clients, payload).await.map(Sent::Whole),
                false => own.put_part(&clients, part, payload).await.map(Sent::Part),
            };
            let mut state = own.lock();
            state.in_flight -= 1;
            match sent {
                Ok(Sent::Whole(receipt)) => state.receipt = Some(receipt),
                Ok(Sent::Part(id)) => {
                    let position = part as usize;
                    if state.parts.len() <= position {
                        state.parts.resize(position + 1, None);
                    }
                    state.parts[position] = Some(id);
                }
                Err(error) if state.failure.is_none() => state.failure = Some(error),
                Err(_) => {}
            }
            own.connection.budget.give_back_write(length);
            drop(state);
            own.changed.notify_all();
        });
        Ok(())
    }

    fn attributes(&self) -> Attributes {
        Attributes::from_iter([(Attribute::Metadata(MARK.into()), self.mark.clone())])
    }

    async fn put_part(
        &self,
        clients: &crate::connection::Clients,
        part: u64,
        payload: PutPayload,
    ) -> Result<PartId> {
        let parts =
            clients.parts.as_ref().ok_or_else(|| read_only(&self.connection, &self.path))?;
        let id = self.begin(parts.as_ref()).await?;
        let sent = parts.put_part(&self.path, &id, part as usize, payload).await;
        sent.map_err(|error| self.explain(&error))
    }

    /// The upload's id, which the first part asks for.
    async fn begin(
        &self,
        parts: &dyn object_store::multipart::MultipartStore,
    ) -> Result<MultipartId> {
        if let Some(id) = &self.lock().id {
            return Ok(id.clone());
        }
        let options = PutMultipartOptions { attributes: self.attributes(), ..Default::default() };
        let begun = match parts.create_multipart_opts(&self.path, options).await {
            Err(object_store::Error::NotSupported { .. }) => {
                parts.create_multipart(&self.path).await
            }
            other => other,
        };
        let begun = begun.map_err(|error| self.explain(&error))?;
        let chosen = {
            let mut state = self.lock();
            match state.failure {
                Some(_) => None,
                None => Some(state.id.get_or_insert_with(|| begun.clone()).clone()),
            }
        };
        if chosen.as_ref() != Some(&begun) {
            // Two parts asked at the same time, or nobody wants it any more.
            let _ = parts.abort_multipart(&self.path, &begun).await;
        }
        chosen.ok_or(Error::Cancelled)
    }

    async fn put_whole(
        &self,
        clients: &crate::connection::Clients,
        payload: PutPayload,
    ) -> Result<Receipt> {
        let options =
            PutOptions { attributes: self.attributes(), ..PutOptions::from(PutMode::Overwrite) };
        let put = clients.objects.put_opts(&self.path, payload, options).await;
        match put {
            Ok(put) => Ok(Receipt { bytes: self.bytes, etag: put.e_tag }),
            Err(error) => self.after_lost_answer(clients, &error).await,
        }
    }

    /// What became of an upload whose end was answered by an error: the answer alone may have been lost.
    async fn after_lost_answer(
        &self,
        clients: &crate::connection::Clients,
        error: &object_store::Error,
    ) -> Result<Receipt> {
        let found = clients.objects.get_opts(&self.path, GetOptions::new().with_head(true)).await;
        if let Ok(found) = found
            && found.meta.size == self.bytes
            && found
                .attributes
                .get(&Attribute::Metadata(MARK.into()))
                .is_some_and(|mark| **mark == *self.mark)
        {
            return Ok(Receipt { bytes: self.bytes, etag: found.meta.e_tag });
        }
        Err(self.explain(error))
    }

    /// Waits for all parts, and makes them an object.
    ///
    /// # Errors
    /// Those of the store; [`Error::Cancelled`].
    pub fn finish(&self) -> Result<Receipt> {
        let mut state = self.lock();
        while state.in_flight > 0 {
            if self.connection.stop.is_raised() {
                return Err(Error::Cancelled);
            }
            state =
                self.changed.wait_timeout(state, STEP).unwrap_or_else(PoisonError::into_inner).0;
        }
        raise(&mut state)?;
        if let Some(receipt) = &state.receipt {
            return Ok(receipt.clone());
        }
        let missing = || self.explain(&Words("a part of it was never written".into()).into_error());
        let count = self.bytes.div_ceil(self.part) as usize;
        let parts: Option<Vec<_>> = state.parts.iter().cloned().collect();
        let parts = parts
            .filter(|parts| parts.len() == count && state.open.is_empty())
            .ok_or_else(missing)?;
        let id = state.id.clone().ok_or_else(missing)?;
        drop(state);
        let clients = self.connection.clients()?;
        let uploads =
            clients.parts.clone().ok_or_else(|| read_only(&self.connection, &self.path))?;
        let receipt = runtime::wait(&self.connection.stop, async {
            match uploads.complete_multipart(&self.path, &id, parts).await {
                Ok(_) => {
                    // What is there, rather than what was answered.
                    let found = clients
                        .objects
                        .get_opts(&self.path, GetOptions::new().with_head(true))
                        .await;
                    let found = found.map_err(|error| self.explain(&error))?.meta;
                    if found.size != self.bytes {
                        let words = "has another size than was sent; somebody else writes to it";
                        return Err(Error::store(self.connection.shown(&self.path), words));
                    }
                    Ok(Receipt { bytes: self.bytes, etag: found.e_tag })
                }
                Err(error) => self.after_lost_answer(&clients, &error).await,
            }
        })?;
        let mut state = self.lock();
        state.id = None;
        state.receipt = Some(receipt.clone());
        Ok(receipt)
    }

    /// Takes back what was sent of an object that will not be.
    pub fn abort(&self) {
        /// How long the store may take.
        const PATIENCE: Duration = Duration::from_secs(5);
        let (id, held) = {
            let mut state = self.lock();
            let held: u64 = state.open.values().map(|open| open.buffer.len() as u64).sum();
            state.open.clear();
            state.failure.get_or_insert(Error::Cancelled);
            (state.id.take(), held)
        };
        self.connection.budget.give_back_write(held);
        let Some(id) = id else { return };
        let Ok(clients) = self.connection.clients() else { return };
        if let Some(parts) = clients.parts {
            runtime::handle().block_on(async {
                // Nothing can be done about a failure here.
                let _ =
                    tokio::time::timeout(PATIENCE, parts.abort_multipart(&self.path, &id)).await;
            });
        }
    }
}

enum Sent {
    Whole(Receipt),
    Part(PartId),
}

/// The first failure, and that there was one afterwards.
fn raise(state: &mut State) -> Result<()> {
    match state.failure.replace(Error::Cancelled) {
        Some(error) => Err(error),
        None => {
            state.failure = None;
            Ok(())
        }
    }
}

/// The error for an output on a web server.
pub(crate) fn read_only(connection: &Connection, path: &ObjectPath) -> Error {
    let words = "a web server is only read; give an output as s3://, gs://, az:// or a directory";
    Error::store(connection.shown(path), words)
}

/// The sink of an upload; dropped unfinished, what was sent is taken back.
pub(crate) struct UploadSink {
    upload: Arc<Upload>,
    finish: Finish,
}

impl std::fmt::Debug for UploadSink {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("UploadSink").field(&self.upload.path).finish()
    }
}

impl UploadSink {
    pub fn new(upload: Arc<Upload>, finish: Finish) -> Self {
        Self { upload, finish }
    }
}

impl Sink for UploadSink {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let finished = self.upload.write_at(bytes, offset).and_then(|is_last| {
            if is_last { (self.finish)(&self.upload.finish()?) } else { Ok(()) }
        });
        finished.map_err(io::Error::other)
    }

    fn take_range(
        &self,
        source: &dyn Source,
        range: Range<u64>,
        offset: u64,
        buffer: &mut [u8],
    ) -> std::result::Result<(), CopyError> {
        take_through_buffer(self, source, range, offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for UploadSink {
    fn drop(&mut self) {
        self.upload.abort();
    }
}

/// A shard that an earlier merge of the same has written.
#[derive(Debug)]
pub(crate) struct Written;

impl Sink for Written {
    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn take_range(
        &self,
        _source: &dyn Source,
        _range: Range<u64>,
        _offset: u64,
        _buffer: &mut [u8],
    ) -> std::result::Result<(), CopyError> {
        Ok(())
    }

    fn is_written(&self) -> bool {
        true
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_few_enough_and_whole_megabytes() {
        assert_eq!(part_size(1), PART);
        assert_eq!(part_size(70 << 30), PART);
        let size = part_size(1 << 40);
        assert!(size.is_multiple_of(MIB) && (1u64 << 40).div_ceil(size) <= MOST_PARTS);
    }
}
