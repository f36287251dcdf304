// The convolutional front end, forward: two 3×3 convolutions (padding 1), each with ReLU, on one-hot cells. Reference:
// convolution.rs; SPEC section 6, "LTMB observation embedding".
//
//   middle = ReLU(W1 ∗ one-hot(codes) + b1),  out = ReLU(W2 ∗ middle + b2)
//
// codes u8 [rows, positions·fields], position = vx·height + vy; weight1 [channels, 9, middle], weight2 [out, middle, 9],
// tap = 3·kx + ky, bias1, bias2, all in the storage type; out [rows, out, positions], channel-major as in the reference;
// middle [rows, positions, middle], position-major: it is for the backward pass alone, which reads it by vectors.
// middle and out are multiples of 8. A code that is no value of its field counts as no channel. A NaN passes.
//
// A block owns a group of `frames` frames at a time, and keeps both weights in shared memory for all of its groups where
// they fit; otherwise slices of them come by turns. The first convolution could add up rows of its weight, 27 per
// position; as a product with zeros and ones, kept as bits and widened in registers, the matrix units do it with half of
// the instructions and no less exactly, and it is the code of the second. A warp owns up to 80 positions and 40 channels.
// `middle` goes to device memory, and to shared memory, where the second product reads it as a map with a border of
// zeros, at an offset for each tap: there is no im2col buffer anywhere.
//
// 4500 frames of 7×7 cells, 20→40→80 channels: 12.7 GFLOP for the second convolution, 4.0 for the first, whose 27
// chunks are 28 for mma; codes read, middle and out written, 54 MB in 16-bit types. Three frames are a group: 147 of 160
// positions for the second convolution, of 192 for the first. Of the second, 25 mma take 67 instructions, 8 of them
// ldmatrix: 1.3 clocks of shared memory each, against 1.6 (sm_90) or 2 (sm_80) of the matrix units, which bound it. Of
// the first, 15 mma take 123 instructions, two clocks each, which bound it. The memory's 54 MB are less than half of
// that time. f32 multiplies by FMA, and its weights come in slices.
//
// History (not measured on a GPU yet)
//   1  a branch around each tile of positions: fragments one after another, offsets for each again, 55 instructions for 5 mma
//   2  a loop for each number of tiles, without branches; the next step's offsets while the matrix units work
//   3  weights by vectors, a cell's codes at once, biases ahead of the stores: few waits for device memory, up to 255
//      registers, which shared memory leaves to two blocks anyway

#include "convolutions.cuh"

namespace {

using namespace convolutions;

template <typename T>
__device__ inline void forward(const Codes& codes, Weights<T, Order::kInputMajor> first, const T* bias1,
                               Weights<T, Order::kOutputMajor> second, const T* bias2, T* middle, T* out, int rows,
                               const Grid& grid, int frames) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Bits<T> bits{memory, grid, ceil_div(codes.channels, kChunk)};
    const int bits_size = round_up(grid.cells(frames) * bits.step(), kVectorBytes);
    first.slice = reinterpret_cast<T*>(memory + bits_size);
    second.slice = first.slice + first.rows * first.pitch();
    const Map<T> map{second.slice + second.rows * second.pitch(), grid, first.rows / kChunk};
    clear(map.cells, grid.cells(frames) * map.step());
    for (int frame = blockIdx.x * frames; frame < rows; frame += gridDim.x * frames) {
        const int positions = min(frames, rows - frame) * grid.positions();
        const int64_t first_position = static_cast<int64_t>(frame) * grid.positions();
        codes.to_bits(bits, frames, first_position, positions);
        __syncthreads();  // and the map of the group before has been used
        convolve(bits, first, positions, [&](int position) {
            T* cell = map.cells + map.corner(position) + grid.centre() * map.step();
            T* kept = middle + (first_position + position) * first.rows;
            return [=](int channel, float(&pair)[2]) {
                for (int i = 0; i < 2; ++i) pair[i] = relu(pair[i] + widen(bias1[channel + i]));
                store<2>(pair, cell + channel);
                store<2>(pair, kept + channel);
            };
        });
        __syncthreads();
        convolve(map, second, positions, [&](int position) {
            const int per_frame = grid.positions();
            const int64_t row = frame + position / per_frame;
            T* to = out + row * second.rows * per_frame + position % per_frame;
            return [=](int channel, float(&pair)[2]) {
                for (int i = 0; i < 2; ++i) {
                    narrow(relu(pair[i] + widen(bias2[channel + i])), to[(channel + i) * per_frame]);
                }
            };
        });
    }
}

}  // namespace

// block 128; any grid; dynamic shared memory: the bits, rounded up to 16 bytes, a slice of each weight, the map. chunks1,
// chunks2: of eight channels in a slice of each weight.
#define CONVOLUTIONS_FORWARD(NAME, T)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads) convolutions_forward_##NAME(                                \
        const uint8_t* __restrict__ codes, const T* __restrict__ weight1, const T* __restrict__ bias1,                 \
        const T* __restrict__ weight2, const T* __restrict__ bias2, T* middle, T* out,                                 \
        uint64_t starts, int32_t fields, int32_t channels, int32_t middle_channels, int32_t out_channels,              \
        int32_t rows, int32_t width, int32_t height, int32_t frames, int32_t chunks1, int32_t chunks2) {               \
        forward<T>({codes, starts, fields, channels}, {weight1, middle_channels, channels, nullptr, chunks1}, bias1,   \
                   {weight2, out_channels, middle_channels, nullptr, chunks2}, bias2, middle, out, rows,               \
                   {width, height}, frames);                                                                           \
    }

CONVOLUTIONS_FORWARD(f32, float)
CONVOLUTIONS_FORWARD(bf16, bf16)
CONVOLUTIONS_FORWARD(f16, f16)
