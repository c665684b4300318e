// Pillion for C and C++: collectives between ranks, on memory of the caller.
//
// cbindgen makes this file from bindings/c/src. Every function that returns int32_t returns
// PILLION_OK, or a code below; pillion_last_error has the text then. Unless a function says
// otherwise, every rank calls it with the same arguments, and in the same order.


#ifndef PILLION_H
#define PILLION_H

#include <stddef.h>
#include <stdint.h>

// Replicas: every rank holds everything.
#define PILLION_SHARD_NOTHING 0

// The optimizer's state is divided (ZeRO-1).
#define PILLION_SHARD_OPTIMIZER 1

// Gradients, too (ZeRO-2).
#define PILLION_SHARD_GRADIENTS 2

// Weights, too (ZeRO-3).
#define PILLION_SHARD_EVERYTHING 3

// IEEE binary32.
#define PILLION_F32 0

// bfloat16.
#define PILLION_BF16 1

// IEEE binary16.
#define PILLION_F16 2

// IEEE binary64.
#define PILLION_F64 3

// Signed 8-bit.
#define PILLION_I8 4

// Unsigned 8-bit: bytes.
#define PILLION_U8 5

// Signed 32-bit.
#define PILLION_I32 6

// Unsigned 32-bit.
#define PILLION_U32 7

// Signed 64-bit.
#define PILLION_I64 8

// Unsigned 64-bit.
#define PILLION_U64 9

// A byte that is true unless it is 0.
#define PILLION_BOOL 10

// The sum.
#define PILLION_SUM 0

// The sum, divided by the number of ranks; integers are rounded towards zero.
#define PILLION_AVG 1

// The product.
#define PILLION_PROD 2

// The smallest; NaN where there is one.
#define PILLION_MIN 3

// The largest; NaN where there is one.
#define PILLION_MAX 4

// Bits that all have. Not of floats.
#define PILLION_BIT_AND 5

// Bits that one has. Not of floats.
#define PILLION_BIT_OR 6

// Bits that an odd number has. Not of floats.
#define PILLION_BIT_XOR 7

// The sum of elements times `factor`, which is the same on all ranks. Of floats.
#define PILLION_PREMUL_SUM 8

// Nothing went wrong.
#define PILLION_OK 0

// A rank died, or left while others still needed it.
#define PILLION_PEER_LOST 1

// A rank did not come in time.
#define PILLION_TIMEOUT 2

// Another rank called another operation.
#define PILLION_MISMATCH 5

// A rank gave up and said so.
#define PILLION_ABORTED 6

// Options contradict each other or the launch.
#define PILLION_BAD_OPTIONS 7

// The arguments of this call cannot be. Nothing was sent, and the communicator is as it was.
#define PILLION_MISUSE 8

// Ranks did not find each other.
#define PILLION_RENDEZVOUS 9

// The host has not enough memory.
#define PILLION_OUT_OF_MEMORY 10

// The operating system refused something.
#define PILLION_SYSTEM 11

// The store through which ranks meet failed.
#define PILLION_STORE 13

// A pointer is NULL that must not be, a number names nothing, or memory overlaps.
#define PILLION_INVALID 100

// This process is a forked child of the one that has the communicator.
#define PILLION_FORKED 101

// Work is still under way, or nothing has come yet.
#define PILLION_UNDER_WAY 102

// A defect of this library: please report it.
#define PILLION_DEFECT 103

// Gradients or a loss are not finite, or there were no tokens: no parameter was changed.
#define PILLION_NO_UPDATE 104

// A file of a checkpoint cannot be read or written.
#define PILLION_FILE 105

// An engine's step is not used as its plan says, or has failed before.
#define PILLION_STEP 106

// Ranks that talk. Any thread may use it, one at a time. After an error every call returns that
// first error.
typedef struct pillion_communicator pillion_communicator;

// A queue of works that have ended. Any thread may use it at any time.
typedef struct pillion_completions pillion_completions;

// Chooses the batch of each step. Any thread may use it, one at a time.
typedef struct pillion_controller pillion_controller;

// A rank's share of a model's parameters. One thread uses it at a time.
typedef struct pillion_engine pillion_engine;

// An operation under way. Its memory stays as it is until the work has ended.
typedef struct pillion_work pillion_work;

// AdamW's state of the caller's parameters, divided among the ranks. One thread uses it at a time.
typedef struct pillion_zero1 pillion_zero1;

// Limits of a communicator. Begin with zeros: 0 is the default of every number.
typedef struct {
  // sizeof(pillion_options), which tells versions of this struct apart.
  size_t size;
  // Milliseconds after which an operation fails that waits for another rank. Default: 300,000.
  uint64_t timeout_ms;
  // Milliseconds within which all ranks come. Default: 60,000.
  uint64_t startup_timeout_ms;
  // Milliseconds after which an operation prints for whom it waits. Default: 10,000.
  uint64_t warn_after_ms;
  // Groups of ranks in which reductions are computed. Default: 1.
  uint64_t reduce_groups;
} pillion_options;

// Values by key that every rank sees, as a program offers them. Any thread may call any of the
// functions at any time until it calls `release`.
//
// A key ends with a zero byte. Each function returns 0, or another number where it fails.
typedef struct {
  // Passed to each function.
  void *context;
  // Sets the value of a key, in place of an older one.
  int32_t (*set)(void*, const char*, const uint8_t*, size_t);
  // Calls `found(answer, value, length)` with the value of a key, or not at all where no rank
  // has set it. Does not wait.
  int32_t (*get)(void*, const char*, void(*)(void*, const uint8_t*, size_t), void*);
  // Adds to the count of a key, which begins at 0, and writes the sum. No other call comes
  // between.
  int32_t (*add)(void*, const char*, int64_t, int64_t*);
  // Called once, when the library calls none of the others any more: soon after
  // pillion_connect_through has returned, and where that has failed once a function that is
  // being called returns. May be NULL.
  void (*release)(void*);
} pillion_store;

// A tensor of a model.
typedef struct {
  // Its name, unique in the model.
  const char *name;
  // Its shape, row-major.
  const size_t *shape;
  // Number of dimensions.
  size_t dimensions;
  // Whether weight decay applies: 1 of matrices, as a rule.
  int32_t decay;
  // Whether it stays as it is: its gradient counts nowhere.
  int32_t frozen;
} pillion_tensor_spec;

// Tensors that are gathered together.
typedef struct {
  // Its name, for messages.
  const char *name;
  // Its tensors.
  const pillion_tensor_spec *tensors;
  // Their number.
  size_t count;
} pillion_unit_spec;

// How parameters are kept and moved. Begin with zeros, and set `size`.
typedef struct {
  // sizeof(pillion_policy), which tells versions of this struct apart.
  size_t size;
  // PILLION_SHARD_NOTHING to PILLION_SHARD_EVERYTHING.
  int32_t sharded;
  // Type of the weights that are lent: PILLION_F32 or PILLION_BF16. Master weights are f32.
  int32_t weights;
  // Type in which gradients travel: PILLION_F32 or PILLION_BF16. They are lent in f32.
  int32_t reduce;
  // 1 to gather weights in place, through memory that all ranks of one host read; 0 to copy
  // them.
  int32_t window;
  // Groups of ranks that each hold everything. 0 means 1.
  size_t replicas;
  // Units that are gathered ahead of the one in use.
  size_t prefetch;
  // Gathered units that exist at a time. 0 means prefetch + 1.
  size_t slots;
} pillion_policy;

// AdamW (Loshchilov and Hutter 2019), with the limit of the gradient's norm.
typedef struct {
  // Decay of the first moment, in [0, 1).
  float beta1;
  // Decay of the second moment, in [0, 1).
  float beta2;
  // Added to the root of the second moment; positive.
  float epsilon;
  // Decoupled weight decay.
  float weight_decay;
  // A mean gradient that is longer is scaled down to this; 0 for no limit.
  double clip;
} pillion_adamw;

// What a step has done; all but exposed_seconds is the same on every rank.
typedef struct {
  // Sum of the losses over all tokens.
  double loss_sum;
  // N, the tokens of all ranks.
  double tokens;
  // Norm of the mean gradient, before clipping.
  double gradient_norm;
  // |sum over k of G_k|^2 of all groups; see pillion_observation.
  double square_norm;
  // The sum over k of |G_k|^2 / n_k; NaN where it was not measured.
  double group_square_norms;
  // Time for which this rank waited for others.
  double exposed_seconds;
} pillion_report;

// Elements in the caller's memory.
typedef struct {
  // The first element, at a multiple of its size. May be NULL where there are none.
  void *data;
  // Number of elements.
  size_t count;
  // Their type, PILLION_F32 and so on.
  int32_t dtype;
} pillion_tensor;

// A message that has come and has not been received.
typedef struct {
  // The rank that sent it.
  size_t from;
  // Number of elements.
  size_t count;
  // Their type.
  int32_t dtype;
} pillion_message;

// The sums of one step over all ranks, before clipping. A group is what one rank summed between
// two reductions. G_k is the gradient of the loss of group k, summed over its n_k tokens, or
// samples where all have the same weight.
typedef struct {
  // K, the number of groups.
  uint64_t groups;
  // Samples of the step.
  uint64_t samples;
  // N, the tokens that the loss counts: the sum of n_k.
  uint64_t tokens;
  // The sum over k of |G_k|^2 / n_k.
  double group_square_norms;
  // |sum over k of G_k|^2.
  double square_norm;
  // Number of gradient values that were not finite.
  uint64_t non_finite;
} pillion_observation;

// What a controller decided.
typedef struct {
  // Samples of the next step.
  uint64_t batch;
  // Smoothed gradient noise scale in samples; NaN while it is unknown.
  double noise_scale;
  // What the rule asked for in samples, before limits; NaN where that is nothing.
  double wanted;
  // This step's variance of one sample's gradient, summed over parameters; NaN where the sums
  // say nothing of it.
  double variance;
  // This step's |mean gradient|^2; NaN as above.
  double square_norm;
  // The same less the noise that it contains; NaN as above.
  double debiased_square_norm;
  // Why the batch is what it is, in a word: scheduled, unusable, between-tests, no-gradient,
  // sufficient, waiting, at-cap, grown or shrunk. Lasts until the next decision.
  const char *reason;
  // Why the sums say nothing, or NULL. Lasts until the next decision.
  const char *unusable;
} pillion_decision;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Joins the ranks of the job that a launcher started (torchrun, mpirun, srun), or a job of this
// rank alone. `options` may be NULL.
//
// # Safety
// `options` is NULL or has its size; `communicator` is a place for a pointer.
int32_t pillion_connect(const pillion_options *given, pillion_communicator **communicator);

// Joins `world` ranks, of which this is rank `rank`, through a store of the program. Ranks on
// several hosts are connected over TCP. `options` may be NULL.
//
// # Safety
// As for pillion_connect; the store's functions keep the promises of pillion_store.
int32_t pillion_connect_through(pillion_store store,
                                size_t rank,
                                size_t world,
                                const pillion_options *given,
                                pillion_communicator **communicator);

// Makes a communicator of some of the ranks, in this order. Only they call.
//
// # Safety
// `communicator` is open; `members` has `count` numbers; `group` is a place for a pointer.
int32_t pillion_group(const pillion_communicator *communicator,
                      const size_t *members,
                      size_t count,
                      pillion_communicator **group);

// This rank's number, from 0; SIZE_MAX for no communicator. Only this rank calls.
//
// # Safety
// `communicator` is NULL or open.
size_t pillion_rank(const pillion_communicator *communicator);

// The number of ranks; 0 for no communicator. Only this rank calls.
//
// # Safety
// `communicator` is NULL or open.
size_t pillion_world(const pillion_communicator *communicator);

// The number of hosts that the ranks are on; 0 for no communicator. Only this rank calls.
//
// # Safety
// `communicator` is NULL or open.
size_t pillion_hosts(const pillion_communicator *communicator);

// The communicator's first error, if there was one. Only this rank calls.
//
// # Safety
// `communicator` is open.
int32_t pillion_health(const pillion_communicator *communicator);

// Gives up: calls here, and on every other rank once it next waits, return PILLION_ABORTED with
// this reason. Only this rank calls.
//
// # Safety
// `communicator` is open; `reason` is NULL or ends with a zero byte.
int32_t pillion_abort(const pillion_communicator *communicator, const char *reason);

// Waits for the operations under way, and leaves. NULL does nothing; a forked child leaves it to
// its parent.
//
// # Safety
// `communicator` is open, and no thread uses it. Works of it may be released later.
int32_t pillion_close(pillion_communicator *communicator);

// Blocks until every rank has called. `limit_ms`: 0 for the communicator's own limit.
//
// # Safety
// `communicator` is open.
int32_t pillion_barrier(const pillion_communicator *communicator, uint64_t limit_ms);

// Makes an empty queue of works that have ended. Only this rank calls.
//
// # Safety
// `completions` is a place for a pointer.
int32_t pillion_completions_new(pillion_completions **completions);

// Puts `token` into the queue once the work has ended. The work may be released before. Only this
// rank calls.
//
// # Safety
// `work` has not been released, and `completions` not been freed.
int32_t pillion_notify(const pillion_work *work,
                       const pillion_completions *completions,
                       uint64_t token);

// Puts `token` into the queue now, as that of a work that ended well. Only this rank calls.
//
// # Safety
// `completions` has not been freed.
int32_t pillion_wake(const pillion_completions *completions, uint64_t token);

// Waits until the queue has a token, or for `limit_ms` milliseconds: then PILLION_UNDER_WAY.
// Otherwise takes the first token out, writes it, and returns how its work ended. Only this rank
// calls.
//
// # Safety
// `completions` has not been freed; `token` is a place for a number.
int32_t pillion_next(const pillion_completions *completions, uint64_t limit_ms, uint64_t *token);

// Frees the queue. Works that it waits for go on. NULL does nothing. Only this rank calls.
//
// # Safety
// `completions` has not been freed before, and no thread uses it.
int32_t pillion_completions_free(pillion_completions *completions);

// Allocates this rank's share of a model, zeroed. Every rank calls with the same arguments.
//
// # Safety
// The communicator is open; `given` has `count` units, whose texts end with a zero byte and whose
// arrays are as long as they say; `kept` has its size; `settings` is a struct and `engine` a place
// for a pointer.
int32_t pillion_engine_new(const pillion_communicator *communicator,
                           const pillion_unit_spec *given,
                           size_t count,
                           const pillion_policy *kept,
                           const pillion_adamw *settings,
                           pillion_engine **engine);

// Sets every parameter to value(context, name of its tensor, its index in that), which must depend
// on nothing else: ranks ask for their shares. The moments become 0.
//
// # Safety
// `engine` has not been freed; `value` may be called.
int32_t pillion_engine_initialize(pillion_engine *engine,
                                  float (*value)(void*, const char*, size_t),
                                  void *context);

// Begins a step of `rounds` rounds, each with a micro-batch at most on each rank; `evaluates` is 1
// for forward passes alone.
//
// # Safety
// `engine` has not been freed.
int32_t pillion_engine_begin(pillion_engine *engine, size_t rounds, int32_t evaluates);

// Begins a round whose micro-batch on this rank has `tokens` tokens in its loss; with 0, passes it
// as a rank that has none.
//
// # Safety
// `engine` has not been freed.
int32_t pillion_engine_round(pillion_engine *engine, size_t tokens);

// Waits until a unit's weights are here, and writes where its tensors are: as many pointers as it
// has tensors. They are read until the next call for this engine.
//
// # Safety
// `engine` has not been freed; `weights` has room for the pointers.
int32_t pillion_engine_forward(pillion_engine *engine, size_t unit, const void **weights);

// As pillion_engine_forward, in a backward pass, with room for the gradients: f32, zeroed where
// the unit's first are added; sums over tokens. `loss` gets where the sum of this rank's losses
// is, to be added to in one unit.
//
// # Safety
// `engine` has not been freed; `weights` and `gradients` have room for the pointers; `loss` is
// NULL or a place for one.
int32_t pillion_engine_backward(pillion_engine *engine,
                                size_t unit,
                                const void **weights,
                                float **gradients,
                                double **loss);

// Ends a step: sums the gradients that are still on their way, and updates the parameters with
// their mean over tokens. Of an evaluation, only ends it. `report` may be NULL.
//
// PILLION_NO_UPDATE says that no parameter was changed on any rank, and training can go on.
//
// # Safety
// `engine` has not been freed; `report` is NULL or a place for a report.
int32_t pillion_engine_finish(pillion_engine *engine, float lr, pillion_report *report);

// Saves parameters and optimizer as the folder step-NUMBER in `folder`, which all ranks see;
// returns once it is on disk.
//
// # Safety
// `engine` has not been freed; `folder` ends with a zero byte.
int32_t pillion_engine_save(pillion_engine *engine, const char *folder, uint64_t number);

// Loads the newest whole checkpoint in `folder`, of any number of ranks and placement, and writes
// its number; PILLION_FILE where there is none.
//
// # Safety
// `engine` has not been freed; `folder` ends with a zero byte; `number` is a place for a number.
int32_t pillion_engine_load(pillion_engine *engine, const char *folder, uint64_t *number);

// Frees an engine. NULL does nothing. Where a step is under way, other ranks wait for it in vain.
// Only this rank calls.
//
// # Safety
// `engine` has not been freed before.
int32_t pillion_engine_free(pillion_engine *engine);

// Zeroed memory that the other ranks of this host read in place, which saves operations of any
// communicator of the job a copy. It stays until pillion_free, also when the communicator is
// closed. Only this rank calls.
//
// # Safety
// `communicator` is open, and `memory` is a place for a pointer.
int32_t pillion_allocate(const pillion_communicator *communicator, size_t bytes, void **memory);

// Gives memory back that pillion_allocate gave. NULL does nothing. Only this rank calls; no work
// uses the memory any more.
int32_t pillion_free(void *memory);

// output[p * n ...] = the shard of rank p. shard: n elements; output: world * n. The shard may lie
// at its place in the output.
//
// # Safety
// The communicator is open; the tensors' memory is there, and stays as it is until the operation
// has ended; `work` is NULL or a place for a pointer.
int32_t pillion_all_gather(const pillion_communicator *communicator,
                           pillion_tensor shard,
                           pillion_tensor output,
                           uint64_t limit_ms,
                           pillion_work **work);

// The tensor = that of rank `root`.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_broadcast(const pillion_communicator *communicator,
                          pillion_tensor tensor,
                          size_t root,
                          uint64_t limit_ms,
                          pillion_work **work);

// The root's output[p * n ...] = the shard of rank p. shard: n elements; output: world * n on the
// root, ignored elsewhere.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_gather(const pillion_communicator *communicator,
                       pillion_tensor shard,
                       pillion_tensor output,
                       size_t root,
                       uint64_t limit_ms,
                       pillion_work **work);

// output = part r of the root's input, on rank r. input: world * n elements on the root, ignored
// elsewhere; output: n.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_scatter(const pillion_communicator *communicator,
                        pillion_tensor input,
                        pillion_tensor output,
                        size_t root,
                        uint64_t limit_ms,
                        pillion_work **work);

// output[p * n ...] = part r of the input of rank p, on rank r. Both: world * n elements.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_all_to_all(const pillion_communicator *communicator,
                           pillion_tensor input,
                           pillion_tensor output,
                           uint64_t limit_ms,
                           pillion_work **work);

// Sends a tensor to rank `to`, which receives as many elements of the same type with this tag.
// Only these two ranks call.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_send(const pillion_communicator *communicator,
                     pillion_tensor tensor,
                     size_t to,
                     uint32_t tag,
                     uint64_t limit_ms,
                     pillion_work **work);

// The tensor = what rank `from` sends with this tag. Only these two ranks call.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_receive(const pillion_communicator *communicator,
                        pillion_tensor tensor,
                        size_t from,
                        uint32_t tag,
                        uint64_t limit_ms,
                        pillion_work **work);

// The tensor = the first message with this tag from any rank. Its number is written to `from`
// before this call returns, or before the call of pillion_wait that finds the work ended. Only
// this rank and the sender call.
//
// # Safety
// As for pillion_all_gather; `from` is NULL, or a place for a number until that is written.
int32_t pillion_receive_any(const pillion_communicator *communicator,
                            pillion_tensor tensor,
                            uint32_t tag,
                            size_t *from,
                            uint64_t limit_ms,
                            pillion_work **work);

// Describes the message that a receive would take now: from rank `from`, or from any where that is
// SIZE_MAX. PILLION_UNDER_WAY where none has come. Only this rank calls.
//
// # Safety
// The communicator is open; `message` is a place for a description.
int32_t pillion_probe(const pillion_communicator *communicator,
                      size_t from,
                      uint32_t tag,
                      pillion_message *message);

// outputs[p] = the shard of rank p. The shard may be outputs[r], on rank r.
//
// # Safety
// The communicator is open; `outputs` has `world` tensors; their memory and the shard's is there,
// and stays as it is until the operation has ended; `work` is NULL or a place for a pointer.
int32_t pillion_all_gather_v(const pillion_communicator *communicator,
                             pillion_tensor shard,
                             const pillion_tensor *outputs,
                             uint64_t limit_ms,
                             pillion_work **work);

// The root's outputs[p] = the shard of rank p. `outputs` is ignored on other ranks.
//
// # Safety
// As for pillion_all_gather_v; `outputs` may be NULL on ranks that are not the root.
int32_t pillion_gather_v(const pillion_communicator *communicator,
                         pillion_tensor shard,
                         const pillion_tensor *outputs,
                         size_t root,
                         uint64_t limit_ms,
                         pillion_work **work);

// output = inputs[r] of the root, on rank r. `inputs` is ignored on other ranks.
//
// # Safety
// As for pillion_all_gather_v; `inputs` may be NULL on ranks that are not the root.
int32_t pillion_scatter_v(const pillion_communicator *communicator,
                          const pillion_tensor *inputs,
                          pillion_tensor output,
                          size_t root,
                          uint64_t limit_ms,
                          pillion_work **work);

// outputs[p] = inputs[r] of rank p, on rank r.
//
// # Safety
// As for pillion_all_gather_v, of `inputs` and `outputs`.
int32_t pillion_all_to_all_v(const pillion_communicator *communicator,
                             const pillion_tensor *inputs,
                             const pillion_tensor *outputs,
                             uint64_t limit_ms,
                             pillion_work **work);

// output = the ranks' inputs[r] combined, on rank r. Every rank's inputs[p] has as many elements.
// Operators and types as for pillion_reduce_scatter.
//
// # Safety
// As for pillion_all_gather_v, of `inputs`.
int32_t pillion_reduce_scatter_v(const pillion_communicator *communicator,
                                 const pillion_tensor *inputs,
                                 pillion_tensor output,
                                 int32_t op,
                                 double factor,
                                 uint64_t limit_ms,
                                 pillion_work **work);

// output = the ranks' inputs combined. Both: n elements; output of the input's type, or f32 for
// 16-bit floats. They may be the same memory. `factor` matters for PILLION_PREMUL_SUM alone.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_all_reduce(const pillion_communicator *communicator,
                           pillion_tensor input,
                           pillion_tensor output,
                           int32_t op,
                           double factor,
                           uint64_t limit_ms,
                           pillion_work **work);

// output = part r of the ranks' inputs combined, on rank r. input: world * n elements; output: n,
// of the input's type, or f32 for 16-bit floats. The output may lie at its place in the input,
// whose other parts are unchanged then.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_reduce_scatter(const pillion_communicator *communicator,
                               pillion_tensor input,
                               pillion_tensor output,
                               int32_t op,
                               double factor,
                               uint64_t limit_ms,
                               pillion_work **work);

// The root's output = the ranks' inputs combined. input: n elements; output: n of its type on the
// root, ignored elsewhere.
//
// # Safety
// As for pillion_all_gather.
int32_t pillion_reduce(const pillion_communicator *communicator,
                       pillion_tensor input,
                       pillion_tensor output,
                       int32_t op,
                       double factor,
                       size_t root,
                       uint64_t limit_ms,
                       pillion_work **work);

// Writes the sum of the squares of a tensor's finite elements, summed in f64, and the number of
// the others. The tensor: n elements of f32 or bf16. Only this rank calls.
//
// # Safety
// The tensor's memory is there, and nobody writes to it; both results are places for a number.
int32_t pillion_square_norm(pillion_tensor tensor, double *square_norm, uint64_t *non_finite);

// Makes a controller. `settings` is JSON, such as {"base": 64, "cap": 4096, "round_to": 8,
// "rule": {"norm-test": {"eta": 0.5}}}; other rules are "constant", {"noise-scale": {"ratio": r}},
// {"stagewise": {"stages": [{"batch": b, "share": s}, ...], "horizon": samples}} and
// {"linear-ramp": {"end": b, "samples": s}}; growth_limit, patience, ema_decay, interval, monotone
// and, of a norm test, variant may be set. `state` is NULL for a new run, or JSON from
// pillion_controller_state. Only this rank calls.
//
// # Safety
// Texts end with a zero byte; `controller` is a place for a pointer.
int32_t pillion_controller_new(const char *settings,
                               const char *state,
                               pillion_controller **controller);

// Samples of the next step; 0 for no controller. Only this rank calls.
//
// # Safety
// `controller` is NULL or has not been freed.
uint64_t pillion_controller_batch(const pillion_controller *controller);

// Takes in the step that just ran, and decides on the next one. To be called once for every step.
// `decision` may be NULL. Only this rank calls.
//
// # Safety
// `controller` has not been freed; `decision` is NULL or a place for a decision.
int32_t pillion_observe(const pillion_controller *controller,
                        pillion_observation observation,
                        pillion_decision *decision);

// Passes over samples that no step has learnt from: schedules go on as if one had. Only this rank
// calls.
//
// # Safety
// `controller` has not been freed.
int32_t pillion_controller_skip(const pillion_controller *controller, uint64_t samples);

// All that a controller remembers, as JSON for a checkpoint: a controller that is made of it
// decides the same, bit for bit. The text lasts until the next call for this controller. NULL for
// no controller. Only this rank calls.
//
// # Safety
// `controller` is NULL or has not been freed.
const char *pillion_controller_state(const pillion_controller *controller);

// Frees a controller. NULL does nothing. Only this rank calls.
//
// # Safety
// `controller` has not been freed before.
int32_t pillion_controller_free(pillion_controller *controller);

// The text of this thread's last error, until its next call of this library. Never NULL.
const char *pillion_last_error(void);

// A number that grows when functions or structs change so that a program must be compiled anew.
uint32_t pillion_abi_version(void);

// Waits until the work has ended, or for `limit_ms` milliseconds: then PILLION_UNDER_WAY, and the
// work goes on. 0 waits as long as the operation's own limit lets it. May be called again. Only
// this rank calls.
//
// # Safety
// `work` has not been released.
int32_t pillion_wait(const pillion_work *work, uint64_t limit_ms);

// PILLION_OK where the work has ended well, its error where it has failed, and PILLION_UNDER_WAY
// else. Does not wait. Only this rank calls.
//
// # Safety
// `work` has not been released.
int32_t pillion_test(const pillion_work *work);

// Calls `callback` with `context` and the result's code once the work has ended: on a thread of
// this library, or at once. The callback returns soon; it neither waits for operations nor starts
// any, and does not release the work. Only this rank calls.
//
// # Safety
// `work` has not been released; `callback` may be called on any thread.
int32_t pillion_on_complete(const pillion_work *work,
                            void (*callback)(void*, int32_t),
                            void *context);

// Gives a work up. Where it is under way, the call waits for it, so that its memory is the
// caller's again. NULL does nothing. Only this rank calls.
//
// # Safety
// `work` has not been released before.
int32_t pillion_release(pillion_work *work);

// Divides AdamW's state of n parameters among the ranks; the parameters become those of rank 0.
// Both arrays stay the caller's: it computes gradients into `grads` and calls pillion_step.
//
// # Safety
// The communicator is open; `params` and `grads` have n floats until pillion_zero1_free, and
// nobody touches them during calls; `settings` is a struct and `zero1` a place for a pointer.
int32_t pillion_zero1_new(const pillion_communicator *communicator,
                          float *params,
                          float *grads,
                          size_t n,
                          const pillion_adamw *settings,
                          pillion_zero1 **zero1);

// Sums the ranks' gradients, updates the parameters with their mean over tokens, and gathers them.
// `grads` has the gradient of the loss summed over this rank's `tokens` tokens, and `loss_sum` is
// that loss. Where gradients are means over as many tokens on every rank, give their mean loss and
// 1. The gradients are not zeroed. `report` may be NULL.
//
// PILLION_NO_UPDATE says that no parameter was changed on any rank, and training can go on.
//
// # Safety
// `zero1` has not been freed; `report` is NULL or a place for a report.
int32_t pillion_step(pillion_zero1 *zero1,
                     float lr,
                     double loss_sum,
                     uint64_t tokens,
                     pillion_report *report);

// What a checkpoint needs besides the parameters: the first and second moments of the parameters
// first, first + 1, ..., `count` floats each, which this rank updates, and the number of updates.
// A run that goes on writes the moments, and calls pillion_zero1_resume. Only this rank calls.
//
// # Safety
// `zero1` has not been freed; the others are places for the results. The moments last as long as
// `zero1`, and are not touched during steps.
int32_t pillion_zero1_state(pillion_zero1 *zero1,
                            size_t *first,
                            size_t *count,
                            float **m,
                            float **v,
                            uint64_t *updates);

// Says how many updates there have been, before the first step of a run that goes on. Only this
// rank calls.
//
// # Safety
// `zero1` has not been freed.
int32_t pillion_zero1_resume(pillion_zero1 *zero1, uint64_t updates);

// Frees the state; the arrays stay the caller's. NULL does nothing. Only this rank calls.
//
// # Safety
// `zero1` has not been freed before.
int32_t pillion_zero1_free(pillion_zero1 *zero1);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PILLION_H */
